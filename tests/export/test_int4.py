"""Programs with weights of 4 bits: which layers take them, what the graph stores, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from onnx import numpy_helper
from torch import nn

from mc_export.build import BuildOptions
from mc_export.build.options import EngineChoice
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.lower.onnx import BF16_OPSET, onnx_from_program
from mc_export.lower.tensorrt import PlanOrder, plan_file
from mc_export.lower.trt_profiles import profiles_of
from mc_export.program.base import Axis, Program, float_tensor
from mc_export.program.export import export_program
from mc_export.quantize.fp8.int4 import Int4Linear
from mc_export.quantize.fp8.layers import Activations, Pointwise, fp8_layer, takes
from mc_export.quantize.fp8.sites import find_sites, in_fp8, put_fp8
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import RequestError
from tests.tiny_steps import KINDS, sizes_for, tiny_step

INT4 = Activations.BLOCKS


class Two(Program):
    """A linear layer and a 1 x 1 convolution in one program."""

    component = "step"

    def __init__(self) -> None:
        super().__init__()
        self.inputs = (float_tensor("x", "B", "S", 192),)
        self.outputs = (float_tensor("y", "B", "S", 48),)
        self.axes = {"B": Axis("B", 1, 4, 2), "S": Axis("S", 1, 64, 9)}
        self.inner = nn.Sequential(nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 48, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)
        return result

    def example(self, extents: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"x": torch.randn(extents["B"], extents["S"], 192, generator=torch.Generator().manual_seed(seed))}


class Timesteps(Program):
    """What Wan does with its timesteps: the same layers for those of the frames and for the one of frames that are given."""

    component = "step"

    def __init__(self) -> None:
        super().__init__()
        self.inputs = (float_tensor("x", "B", "S"),)
        self.outputs = (float_tensor("y", "B", "S", 64),)
        self.axes = {"B": Axis("B", 1, 4, 2), "S": Axis("S", 1, 64, 9)}
        self.inner = nn.Sequential(nn.Linear(256, 64), nn.SiLU(), nn.Linear(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames, given = (self.inner(get_timestep_embedding(times, 256)) for times in (x.flatten(), torch.zeros(1)))
        result: torch.Tensor = frames.unflatten(0, x.shape) + given
        return result

    def example(self, extents: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"x": torch.randn(extents["B"], extents["S"], generator=torch.Generator().manual_seed(seed))}


def test_what_takes_int4() -> None:
    assert takes(nn.Linear(96, 16), INT4)
    assert takes(nn.Conv2d(64, 32, 1), INT4)
    assert not takes(nn.Linear(48, 16), INT4), "no block divides the input width"
    assert not takes(nn.Linear(64, 20), INT4)
    assert not takes(nn.Conv2d(64, 32, 3, padding=1), INT4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_with_its_rounded_weights(bias: bool) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 80, bias=bias), torch.randn(3, 7, 192)
    layer = fp8_layer(plain, INT4, 0.0)
    assert isinstance(layer, Int4Linear)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, plain.bias), rtol=1e-5, atol=1e-5)
        error = (layer(x) - plain(x)).norm() / plain(x).norm()
    assert 0.03 < error < 0.15
    point, picture = nn.Conv2d(64, 32, 1), torch.randn(2, 64, 5, 3)
    cells = fp8_layer(point, INT4, 0.0)
    assert isinstance(cells, Pointwise)
    with torch.no_grad():
        assert 0.01 < (cells(picture) - point(picture)).norm() / point(picture).norm() < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_steps_take_int4_and_are_the_same_again(kind: str) -> None:
    program = tiny_step(kind)
    feed = program.example(sizes_for(program, large=True), seed=3)
    before = program.run(feed)["next_sample"]
    sites = find_sites(program, [feed], INT4)
    assert len(sites) >= 4
    with in_fp8(program, sites, INT4):
        assert sum(isinstance(layer, Int4Linear) for layer in program.modules()) == sum(len(site.layers) for site in sites)
        changed = program.run(feed)["next_sample"]
    assert 1e-3 < (changed - before).norm() / before.norm() < 0.5
    assert torch.equal(program.run(feed)["next_sample"], before)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_graph_stores_4_bits_and_computes_the_same(tmp_path: Path, bf16: bool) -> None:
    torch.manual_seed(4)
    program = Two().eval()
    feeds = [program.example({"B": 2, "S": size}, seed=size) for size in (9, 5)]
    put_fp8(program, find_sites(program, feeds[:1], INT4), INT4)
    if bf16:
        program = compute_in_bf16(program)  # type: ignore[assignment]
    exported = export_program(program)
    file = onnx_from_program(exported, program.inputs, program.outputs, tmp_path / "step.onnx", opset=BF16_OPSET)
    graph = onnx.load(file.path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    blocks = [next(one.i for one in node.attribute if one.name == "block_size") for node in pairs]
    assert blocks == [64, 64]
    layers = [layer for layer in program.modules() if isinstance(layer, Int4Linear)]
    for node, layer in zip(pairs, layers, strict=True):
        codes = stored[node.input[0]]
        assert codes.data_type == onnx.TensorProto.INT4
        assert len(codes.raw_data) == layer.codes.numel() // 2
        assert (numpy_helper.to_array(codes).astype(np.int8) == layer.codes.numpy()).all()
        assert stored[node.input[1]].data_type == (onnx.TensorProto.BFLOAT16 if bf16 else onnx.TensorProto.FLOAT)
    if not bf16:  # onnxruntime's CPU provider has no products in bf16
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # its own choice rounds inputs to int8
        session = ort.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
        for feed in feeds:
            (found,) = session.run(None, {"x": feed["x"].numpy()})
            np.testing.assert_allclose(found, program.run(feed)["y"].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Two, Timesteps])
def test_tensorrt_builds_it_also_where_a_layer_is_run_twice(kind: type[Program], tmp_path: Path) -> None:
    """Its library ends the process where two products read the same weights of 4 bits: then this test's, too."""
    pytest.importorskip("tensorrt_rtx")
    program: Program = kind().eval()
    feed = program.example({"B": 2, "S": 9})
    put_fp8(program, find_sites(program, [feed], INT4), INT4)
    program = compute_in_bf16(program)
    file = onnx_from_program(
        export_program(program), program.inputs, program.outputs, tmp_path / "step.onnx", opset=BF16_OPSET
    )
    graph = onnx.load(file.path).graph
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len({node.input[0] for node in pairs}) == len(pairs) == (2 if kind is Two else 4)
    for node in pairs:
        assert sum(node.output[0] in reader.input for reader in graph.node) == 1
    profiles = profiles_of(program.axes, {"B": 1})
    order = PlanOrder("step", "tensorrt-rtx", Precision.INT4, program.inputs, program.outputs, profiles, ("8.9",))
    (plan,), _ = plan_file(file, order, tmp_path)
    assert plan.stat().st_size > 0


@pytest.mark.parametrize(("options", "said"), [
    ({"engines": {"vae_decoder": EngineChoice("tensorrt-rtx", Precision.INT4)}}, "int4 is for planner and step; take ten"),
    ({"target": "tensorrt-rtx", "precision": Precision.INT4, "step_cache": True}, "int4 is calibrated on a whole one"),
])  # fmt: skip
def test_what_int4_is_not_for_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        BuildOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"onnxruntime has no int4.*tensorrt:int4"):
        EngineChoice("onnxruntime", Precision.INT4)


def test_a_bundle_in_int4_has_the_other_engines_in_bf16() -> None:
    options = BuildOptions(target="tensorrt-rtx", precision=Precision.INT4)
    assert [options.choice(name).precision.value for name in ("planner", "step", "vae_decoder")] == ["int4", "int4", "bf16"]
