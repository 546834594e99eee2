"""The quantizers on the step of a tiny checkpoint, calibrated on its own denoising."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest

from mc_export.build.options import BuildOptions
from mc_export.build.parts import parts_of
from mc_export.checkpoint import Checkpoint
from mc_export.lower import Calibration
from mc_export.lower.onnx import OnnxFile
from mc_export.lower.tensorrt import PlanOrder, plan_file
from mc_export.lower.trt_profiles import profiles_of
from mc_export.quantize import calibration, quantize_onnxruntime, quantize_openvino, quantize_tensorrt
from mc_export.quantize import onnxruntime as ort_quantizer
from mc_export.quantize import openvino as ov_quantizer
from mc_export.quantize import tensorrt as trt_quantizer
from mc_export.quantize.calibration import MAX_STEP_INPUTS, calibration_inputs
from mc_export.quantize.pointwise import pointwise_to_products, transpose_weights_once
from mc_export.quantize.policy import GATE, split
from mc_export.quantize.sensitivity import Selection
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError
from tests.export.conftest import LIMITS, Exported

Export = Callable[[str, str], Exported]
# Two blocks and the canvas connector's: value, gate and last convolution each. The patch embedding is 1 x 1 too.
POINTWISE = 3 * 3 + 1


class Case(NamedTuple):
    onnx: Path
    inputs: Calibration


@pytest.fixture(scope="module")
def step(checkpoints: dict[str, Checkpoint], exported: Export) -> Case:
    # The tiny scheduler is of order 1; the shared graph is of order 2 and takes a history.
    inputs = []
    for feed in calibration_inputs(checkpoints["metacanvas"], "step"):
        scale, a, b = feed["coefficients"][0]
        history = np.zeros((1, 2, *feed["sample"].shape[1:]), np.float32)
        inputs.append({**feed, "history": history, "coefficients": np.array([[scale, a, 0, b, 0]], np.float32)})
    return Case(exported("metacanvas", "step").onnx.path, inputs)


def run_onnx(path: Path, feed: dict[str, Any], output: str = "next_sample") -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run([output], feed)[0]


def run_openvino(model: Any, feed: dict[str, Any]) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(feed)["next_sample"]


def relative(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def test_calibration_is_what_engines_are_given(checkpoints: dict[str, Checkpoint]) -> None:
    options = BuildOptions(engines={"vae_encoder": BuildOptions().choice("vae_encoder")})
    parts = parts_of(checkpoints["metacanvas"], LIMITS, options)
    assert [part.component for part in parts] == ["planner", "step", "vae_decoder", "vae_encoder"]
    for part in parts:
        inputs = calibration_inputs(checkpoints["metacanvas"], part.component)
        program = part.make()
        dynamic: dict[str, int] = {}
        for spec in program.inputs:
            if spec.name == "history":
                continue
            array = inputs[0][spec.name]
            assert array.dtype == spec.dtype
            assert array.ndim == len(spec.shape), spec.name
            for size, wanted in zip(array.shape, spec.shape, strict=True):
                if isinstance(wanted, str):
                    assert dynamic.setdefault(wanted, size) == size
                elif spec.name != "coefficients":
                    assert size == wanted
    text = calibration_inputs(checkpoints["stock"], "text_encoder")[0]
    assert {name: array.dtype.name for name, array in text.items()} == {
        "input_ids": "int64", "attention_mask": "int64", "select": "int64"
    }  # fmt: skip


def test_calibration_sees_the_whole_schedule_and_shares_what_does_not_change(checkpoints: dict[str, Checkpoint]) -> None:
    inputs = calibration_inputs(checkpoints["metacanvas"], "step")
    timesteps = [float(feed["timestep"][0]) for feed in inputs]
    assert len(inputs) <= MAX_STEP_INPUTS
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] > 900
    assert timesteps[-1] < 400
    assert len({id(feed["context"]) for feed in inputs}) <= len(calibration.PROMPTS)


def test_a_checkpoints_own_prompts_are_calibrated_on_but_for_those_over_its_limit(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["metacanvas"]
    config = checkpoint.config
    assert config is not None

    def lengths(*prompts: str) -> list[int]:
        prompt = config.prompt.model_copy(update={"calibration": prompts})
        changed = replace(checkpoint, config=config.model_copy(update={"prompt": prompt}))
        return [feed["input_ids"].shape[1] for feed in calibration_inputs(changed, "planner")]

    short, long, empty = lengths("a cat", "a red circle left of a blue square")
    assert empty < short < long
    assert lengths("a cat", "word " * config.prompt.max_tokens) == [short, empty]
    assert lengths("word " * config.prompt.max_tokens) == [empty, empty]
    assert len(lengths()) == len(calibration.PROMPTS) + 1


def test_calibration_is_the_same_every_time(checkpoints: dict[str, Checkpoint]) -> None:
    first = calibration_inputs(checkpoints["metacanvas"], "step")
    calibration._recorded.clear()
    again = calibration_inputs(checkpoints["metacanvas"], "step")
    assert len(first) == len(again)
    for feed, other in zip(first, again, strict=True):
        for name in feed:
            np.testing.assert_array_equal(feed[name], other[name])


def test_pointwise_convolutions_become_products(step: Case, tmp_path: Path) -> None:
    model = onnx.load(step.onnx)
    before = sum(node.op_type == "Conv" for node in model.graph.node)
    assert pointwise_to_products(model) == POINTWISE
    assert sum(node.op_type == "Conv" for node in model.graph.node) == before - POINTWISE
    onnx.save(model, tmp_path / "step.onnx")
    feed = step.inputs[0]
    np.testing.assert_allclose(run_onnx(tmp_path / "step.onnx", feed), run_onnx(step.onnx, feed), atol=1e-5)


def test_weights_that_two_products_share_are_quantized_around(tmp_path: Path) -> None:
    """As Wan's timestep embedding has them, which runs for the noisy and the clean frames."""
    generator = np.random.default_rng(1)
    drawn = {"shared": (12, 8), "bias": (12,), "matrix": (12, 6)}
    weights = [
        onnx.numpy_helper.from_array(generator.standard_normal(shape).astype(np.float32), name) for name, shape in drawn.items()
    ]
    nodes = [
        onnx.helper.make_node("Gemm", ["a", "shared", "bias"], ["c"], name="first", transB=1),
        onnx.helper.make_node("Gemm", ["b", "shared", "bias"], ["d"], name="second", transB=1),
        onnx.helper.make_node("Sub", ["c", "d"], ["e"], name="minus"),
        onnx.helper.make_node("MatMul", ["e", "matrix"], ["next_sample"], name="product"),
    ]
    ends = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["B", None]) for name in "ab"}
    result = onnx.helper.make_tensor_value_info("next_sample", onnx.TensorProto.FLOAT, ["B", 6])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "shares", list(ends.values()), [result], weights),
        opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    onnx.save(model, tmp_path / "plain.onnx")
    feeds = [{name: generator.standard_normal((3, 8)).astype(np.float32) for name in "ab"} for _ in range(4)]
    options = quantize_onnxruntime(tmp_path / "plain.onnx", tmp_path / "int8.onnx", feeds, "step")
    result, expected = (run_onnx(tmp_path / f"{name}.onnx", feeds[0]) for name in ("int8", "plain"))
    assert 0 < relative(result, expected) < 0.02
    assert options["kept_fp32"] == []
    assert transpose_weights_once(model) == 2
    assert transpose_weights_once(model) == 0


@pytest.mark.slow
def test_onnxruntime_int8_is_within_its_gate(step: Case, tmp_path: Path) -> None:
    path = tmp_path / "step.onnx"
    options = quantize_onnxruntime(step.onnx, path, step.inputs, "step")
    held_out = split(step.inputs, "step").held_out
    results, references = (np.stack([run_onnx(file, feed) for feed in held_out]) for file in (path, step.onnx))
    assert 0 < relative(results, references) <= GATE["step"]
    assert options["held_out_error"] <= GATE["step"]
    weights = [tensor for tensor in onnx.load(path).graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert len(weights) > 3 * POINTWISE
    assert options["kept_fp32_work"] < 0.5


@pytest.mark.slow
def test_openvino_int8_is_within_its_gate_and_says_nothing(step: Case, capsys: pytest.CaptureFixture[str]) -> None:
    model = ov.Core().read_model(str(step.onnx))
    quantized, options = quantize_openvino(model, step.inputs, "step")
    assert capsys.readouterr().out == ""
    held_out = split(step.inputs, "step").held_out
    results, references = (np.stack([run_openvino(each, feed) for feed in held_out]) for each in (quantized, model))
    assert 0 < relative(results, references) <= GATE["step"]
    assert options["held_out_error"] <= 1.25 * GATE["step"]
    assert options["properties"]["INFERENCE_PRECISION_HINT"] in {"bf16", "f32"}
    kinds = [op.get_element_type().get_type_name() for op in quantized.get_ops() if op.get_type_name() == "Constant"]
    assert kinds.count("i8") > 2 * POINTWISE


@pytest.mark.slow
def test_tensorrt_int8_is_within_its_gate_symmetric_and_read(exported: Export, step: Case, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "step.onnx"
    options = quantize_tensorrt(step.onnx, path, step.inputs, "step")
    held_out = split(step.inputs, "step").held_out
    results, references = (np.stack([run_onnx(file, feed) for feed in held_out]) for file in (path, step.onnx))
    assert 0 < relative(results, references) <= GATE["step"]
    assert options["held_out_error"] <= GATE["step"]
    assert options["kept_fp32_work"] < 0.5
    graph = onnx.load(path).graph
    zeros = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert zeros
    assert all(weights[name].data_type == onnx.TensorProto.INT8 for name in zeros)
    assert not any(onnx.numpy_helper.to_array(weights[name]).any() for name in zeros)
    read = {name for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv") for name in node.input}
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert {name for node in graph.node for name in node.input if name in rounded} <= read, (
        "only what is quantized reads rounded"
    )
    program = exported("metacanvas", "step").program
    order = PlanOrder("step", "tensorrt-rtx", Precision.INT8, program.inputs, program.outputs, profiles_of(program.axes, {}))
    files, _ = plan_file(OnnxFile.at(path), order, tmp_path)
    assert files[0].stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("component", ["step", "vae_decoder"])
def test_layers_that_are_kept_give_the_float_results(
    component: str, exported: Export, checkpoints: dict[str, Checkpoint], step: Case, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    graph = exported("metacanvas", component).onnx.path
    inputs = step.inputs if component == "step" else calibration_inputs(checkpoints["metacanvas"], component)
    output = "next_sample" if component == "step" else "pixels"
    monkeypatch.setattr(ort_quantizer, "choose_kept", keep_all := _KeepAll())
    path = tmp_path / "kept.onnx"
    options = quantize_onnxruntime(graph, path, inputs, component)
    result, reference = (run_onnx(file, inputs[0], output) for file in (path, graph))
    np.testing.assert_allclose(result, reference, atol=1e-5)
    assert options["kept_fp32_work"] == 1
    assert keep_all.probed < 1e-5

    monkeypatch.setattr(trt_quantizer, "choose_kept", keep_all)
    options = quantize_tensorrt(graph, path, inputs, component)
    np.testing.assert_allclose(run_onnx(path, inputs[0], output), reference, atol=1e-5)
    assert options["kept_fp32_work"] == 1
    assert keep_all.probed < 1e-5

    monkeypatch.setattr(ov_quantizer, "choose_kept", keep_all)
    keep_all.probed = float("inf")
    quantize_openvino(ov.Core().read_model(str(graph)), inputs, component)
    assert keep_all.probed < 1e-5


class _KeepAll:
    """Stands for the choice: measures with every layer kept, and keeps them."""

    probed = float("inf")

    def __call__(self, layers: Any, probe: Any, gate: float) -> Any:
        from mc_export.quantize.sensitivity import Selection

        names = tuple(layer.name for layer in layers)
        self.probed = probe(frozenset(names))
        return Selection(names, self.probed, self.probed, 1.0, 1)


def test_nothing_to_calibrate_on_is_an_error(step: Case, tmp_path: Path) -> None:
    shutil.copy(step.onnx, tmp_path / "in.onnx")
    with pytest.raises(EngineError, match="calibrate"):
        quantize_onnxruntime(tmp_path / "in.onnx", tmp_path / "out.onnx", [], "step")


@pytest.mark.parametrize(("compiles", "hint"), [(True, "bf16"), (False, "f32")])
def test_arithmetic_that_openvino_has_no_kernel_for_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, compiles: bool, hint: str
) -> None:
    """Some int8 products do not compile with bf16 around them; the engine runs in float32 there."""
    right = [{"context": np.ones(3, np.float32)}]

    def outputs(model: Any, feeds: Any, asked: str) -> Any:
        if asked == "bf16" and not compiles:
            raise RuntimeError("Check 'any_of(scale.size(), OC, 1U)' failed")
        return right

    monkeypatch.setattr(ov_quantizer, "_outputs", outputs)
    options = ov_quantizer._options(None, Selection((), 0, 0, 0, 1), "image_encoder", [], right, 4)
    assert options["properties"] == {"INFERENCE_PRECISION_HINT": hint}
    assert options["held_out_error"] == 0
