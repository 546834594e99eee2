"""Programs in FP8: where they can be, what each layer costs, what is kept, and that kernels and graphs compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from benchmarks import fp8_quality, report
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.lower.onnx import BF16_OPSET, onnx_from_program
from mc_export.program.base import Axis, Program, float_tensor
from mc_export.program.export import export_program
from mc_export.quantize.fp8.layers import FP8_ACTIVATIONS, Activations, Fp8Linear, Fp8RoundedLinear, Pointwise, fp8_layer, takes
from mc_export.quantize.fp8.sites import find_sites, in_fp8, put_fp8
from mc_export.rewrites.counts import check_operators
from mc_export.rewrites.kernels import use_kernels
from mc_export.rewrites.parts import as_linear, merged_linear
from mc_runtime.errors import EngineError
from tests import tiny_steps
from tests.tiny_steps import sizes_for, tiny_step

KINDS = ["sana", "flux-kontext", "wan"]


class Convolved(nn.Module):
    """Two layers of one input, one of another, and two that FP8 is not for."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(32, 48), nn.Linear(32, 16, bias=False), nn.Linear(48, 32)
        self.narrow, self.wide = nn.Linear(32, 20), nn.Conv2d(32, 32, 3, padding=1)
        self.point = nn.Conv2d(32, 64, 1)


def test_the_page_has_the_recorded_table() -> None:
    recorded = report.from_json(report.RESULTS / f"{fp8_quality.RESULT}.json")["demos"]
    assert fp8_quality.PAGE.read_text(encoding="utf-8") == fp8_quality.page_with(recorded), "run benchmarks.fp8_quality"


def test_what_takes() -> None:
    module = Convolved()
    assert [name for name, layer in module.named_modules() if takes(layer)] == ["query", "key", "out", "point"]
    assert not takes(nn.Conv2d(32, 32, 1, stride=2))
    assert not takes(nn.Conv2d(32, 32, 1, groups=2))
    assert not takes(nn.Conv2d(32, 32, 1, padding=1))


@pytest.mark.parametrize("activations", FP8_ACTIVATIONS)
def test_a_pointwise_convolution_is_a_layer_on_its_cells(activations: Activations) -> None:
    point, picture = nn.Conv2d(32, 64, 1), torch.randn(2, 32, 5, 7)
    layer = fp8_layer(point, activations, float(picture.abs().max()))
    assert isinstance(layer, Pointwise)
    with torch.no_grad():
        cells = layer.linear(picture.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.equal(layer(picture), cells)
        error = (layer(picture) - point(picture)).norm() / point(picture).norm()
        assert 0.01 < error < 0.06
        assert torch.allclose(layer.linear.weight, point.weight.flatten(1), rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize("kind", tiny_steps.KINDS)
def test_sites_are_the_layers_that_read_one_input(kind: str) -> None:
    program = tiny_step(kind)
    feeds = [program.example(sizes_for(program, large)) for large in (False, True)]
    sites = find_sites(program, feeds)
    names = [name for site in sites for name in site.layers]
    assert len(names) == len(set(names))
    merged = [site for site in sites if len(site.layers) > 1]
    assert len(merged) >= 3, "the projections of an attention"
    assert all(site.work > 0 and site.largest > 0 for site in sites)
    by_name = {site.name: site for site in sites}
    (projections,) = [site for site in merged if "connector.step_block.block.attn1.to_q" in site.name]
    assert [name.rpartition(".")[2] for name in projections.layers] == ["to_q", "to_k", "to_v"]
    larger = find_sites(program, feeds[1:])
    assert by_name[larger[0].name].work < larger[0].work, "the mean of two runs"


@pytest.mark.parametrize("kind", tiny_steps.KINDS)
@pytest.mark.parametrize("activations", FP8_ACTIVATIONS)
def test_a_program_is_the_same_again_afterwards(kind: str, activations: Activations) -> None:
    program = tiny_step(kind)
    feed = program.example(sizes_for(program, large=True), seed=3)
    before = program.run(feed)["next_sample"]
    sites = find_sites(program, [feed])
    assert len(sites) >= 4
    with in_fp8(program, sites, activations):
        changed = program.run(feed)["next_sample"]
        made = sum(isinstance(layer, Fp8Linear | Fp8RoundedLinear) for layer in program.modules())
        assert made == sum(len(site.layers) for site in sites)
    assert 1e-4 < (changed - before).norm() / before.norm() < 0.5
    assert torch.equal(program.run(feed)["next_sample"], before)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_take_programs_in_fp8(kind: str) -> None:
    """Merged projections have the codes of their parts, so the rewritten step differs by what tips a code on its way."""
    plain, rewritten = tiny_step(kind), tiny_step(kind)
    sizes = sizes_for(plain, large=True)
    sites = find_sites(plain, [plain.example(sizes)])
    for program in (plain, rewritten):
        put_fp8(program, sites, Activations.ROWS)
    counts = use_kernels(rewritten)
    assert counts["canvas_inject_fp8"] == 1
    assert "canvas_injection_attention" not in counts
    layers = sum(isinstance(layer, Fp8Linear) for layer in rewritten.modules())
    assert layers < sum(isinstance(layer, Fp8Linear) for layer in plain.modules())
    feed = plain.example(sizes, seed=5)
    expected, result = plain.run(feed)["next_sample"], rewritten.run(feed)["next_sample"]
    assert (result - expected).norm() / expected.norm() < 0.03  # codes tipped by float32's rounding; a wrong layer is off by 1
    if kind == "sana":
        exported = export_program(compute_in_bf16(rewritten))
        check_operators(exported, "step", counts, layers)
        with pytest.raises(EngineError, match="products in fp8 where 99 belong"):
            check_operators(exported, "step", counts, 99)
        codes = [tensor for tensor in exported.constants.values() if getattr(tensor, "dtype", None) == torch.float8_e4m3fn]
        assert len(codes) == layers


@pytest.mark.parametrize("kind", KINDS)
def test_what_kernels_merge_is_one_site(kind: str) -> None:
    """So that no choice of sites leaves a merged product half in FP8."""
    sites = find_sites(program := tiny_step(kind), [program.example(sizes_for(program, large=False))])
    for site in sites:
        program = tiny_step(kind)
        put_fp8(program, [site], Activations.ROWS)
        use_kernels(program)
        assert sum(isinstance(layer, Fp8Linear) for layer in program.modules()) in (1, len(site.layers))


def test_layers_merge_whole_or_not_at_all() -> None:
    layers = [nn.Linear(32, width) for width in (16, 48)]
    in_fp8_too = [fp8_layer(layer, Activations.ROWS, 0.0) for layer in layers]
    merged, x = merged_linear(in_fp8_too), torch.randn(3, 5, 32)
    assert isinstance(merged, Fp8Linear)
    assert (merged.in_features, merged.out_features) == (32, 64)
    torch.testing.assert_close(merged(x), torch.cat([layer(x) for layer in in_fp8_too], dim=-1), rtol=1e-6, atol=1e-6)
    with pytest.raises(EngineError, match="not all in fp8"):
        merged_linear([layers[0], in_fp8_too[1]])
    point = nn.Conv2d(32, 16, 1)
    torch.testing.assert_close(as_linear(point)(x), point(x.movedim(-1, 1)[..., None])[..., 0].movedim(1, -1))


class Layered(Program):
    """Two layers, one of them a convolution, rounded to e4m3."""

    component = "step"
    inputs = (float_tensor("x", "B", "S", 32),)
    outputs = (float_tensor("y", "B", "S", 48),)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(32, 64), nn.Conv2d(64, 48, 1)
        self.axes = {"B": Axis("B", 1, 4, 2), "S": Axis("S", 1, 64, 5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        result: torch.Tensor = self.second(hidden.movedim(-1, 1)[..., None])[..., 0].movedim(1, -1)
        return result

    def example(self, extents: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(extents["B"], extents["S"], 32, generator=torch.Generator().manual_seed(seed))}


def test_the_graph_rounds_as_the_program_does(tmp_path: Path) -> None:
    """onnxruntime runs the pairs of quantize and dequantize one by one; TensorRT makes FP8 products of them."""
    program = Layered()
    sites = find_sites(program, [program.example({"B": 2, "S": 9})])
    with in_fp8(program, sites, Activations.TENSOR):
        graph = onnx_from_program(
            export_program(program), program.inputs, program.outputs, tmp_path / "g.onnx", opset=BF16_OPSET
        )
        assert graph.operators()["QuantizeLinear"] == 2
        assert graph.operators()["DequantizeLinear"] == 4
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
        for seed, extents in enumerate(({"B": 1, "S": 1}, {"B": 3, "S": 7})):
            feed = program.example(extents, seed)
            (result,) = session.run(None, {"x": feed["x"].numpy()})
            expected = program.run(feed)["y"].numpy()
            # Rounded inputs are equal to the bit; tanh is not, and may tip a code by one of sixteen.
            assert np.linalg.norm(result - expected) / np.linalg.norm(expected) < 5e-3
