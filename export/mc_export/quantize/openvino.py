"""Int8 for OpenVINO, by NNCF's post-training quantization."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, prod
from typing import Any

import nncf
import numpy as np
import openvino as ov
import rich
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

from mc_export.lower import Calibration
from mc_export.quantize.policy import GATE, described, split
from mc_export.quantize.sensitivity import Layer, Outputs, Selection, choose_kept, relative_error
from mc_export.quiet import quiet

_KINDS = frozenset({"MatMul", "Convolution"})
_PASSED_THROUGH = frozenset({"Convert", "Transpose", "Reshape", "Unsqueeze"})
# NNCF quantizes in front of these rather than behind them.
_MOVES = _PASSED_THROUGH | {"Broadcast", "Concat", "Gather", "Slice", "Split", "Squeeze", "StridedSlice", "VariadicSplit"}
_THREADS: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}


def quantize_openvino(model: Any, inputs: Calibration, component: str) -> tuple[Any, dict[str, Any]]:
    """Quantizes layers with constant weights, as many as the component's gate allows.

    Products of two activations (attention) and depthwise convolutions stay in float: they are a few percent of the work, and
    their quantization costs error. What lies between int8 layers runs in bf16 where that too is within the gate.

    Args:
        model: an `ov.Model` with float32 weights; it is not changed.
        inputs: what the engine is given in real requests.
        component: its name.

    Returns:
        The quantized model, and the engine's options for the manifest.

    Raises:
        EngineError: there is nothing to calibrate on.
    """
    feeds = split(inputs, component)
    layers = quantizable_layers(model, feeds.held_out[0])
    references = _outputs(model, feeds.held_out, "f32")
    fully = _quantized(model, layers, feeds.calibration, frozenset())

    def probe(kept: frozenset[str]) -> float:
        return relative_error(_outputs(_with_kept(fully, model, layers, kept), feeds.held_out, "f32"), references)

    selection = choose_kept(layers, probe, GATE[component])
    quantized = _quantized(model, layers, feeds.calibration, frozenset(selection.kept)) if selection.kept else fully
    return quantized, _options(quantized, selection, component, feeds.held_out, references, len(feeds.calibration))


def _options(
    model: Any, selection: Selection, component: str, held_out: Calibration, references: Sequence[Outputs], calibrated_on: int
) -> dict[str, Any]:
    """The manifest's options, with the arithmetic between int8 layers that the measured error allows."""
    errors = {"f32": relative_error(_outputs(model, held_out, "f32"), references)}
    try:
        errors["bf16"] = relative_error(_outputs(model, held_out, "bf16"), references)
    except RuntimeError:  # of some int8 products with more behind them, the library makes no bf16 kernel
        errors["bf16"] = inf
    limit = max(GATE[component], 1.25 * errors["f32"])
    hint = "bf16" if errors["bf16"] <= limit else "f32"
    options = described(selection, calibrated_on) | {"held_out_error": float(f"{errors[hint]:.3g}")}
    return options | {"properties": {"INFERENCE_PRECISION_HINT": hint}}


def quantizable_layers(model: Any, feed: dict[str, np.ndarray[Any, Any]]) -> list[Layer]:
    """The products and convolutions with constant weights, in graph order, with their work on `feed`."""
    shaped = model.clone()
    shaped.reshape({name: list(array.shape) for name, array in feed.items()})
    layers = []
    for op in shaped.get_ordered_ops():
        if op.get_type_name() in _KINDS and _has_weights(op):
            weights = list(op.input_value(1).get_shape())
            # A product's weights are [K, N] or [N, K]; a convolution's [out, in, h, w].
            depth = prod(weights) // op.get_output_shape(0)[-1 if op.get_type_name() == "MatMul" else 1]
            layers.append(Layer(op.get_friendly_name(), float(prod(op.get_output_shape(0)) * depth)))
    return layers


def _has_weights(op: Any) -> bool:
    """Whether its second input is constant, behind what only changes its form, and for a product a matrix of several rows."""
    source = op.input_value(1)
    if op.get_type_name() == "MatMul" and (len(source.get_shape()) != 2 or min(source.get_shape()) < 2):
        return False
    node = source.get_node()
    while node.get_type_name() in _PASSED_THROUGH:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _quantized(model: Any, layers: Sequence[Layer], calibration: Calibration, kept: frozenset[str]) -> Any:
    wanted = {layer.name for layer in layers} - kept
    if not wanted:
        return model
    left_out = [
        op.get_friendly_name()
        for op in model.get_ops()
        if op.get_type_name() in _QUANTIZED_BY_NNCF and op.get_friendly_name() not in wanted
    ]
    with _quiet():
        return nncf.quantize(
            model,
            nncf.Dataset(calibration),
            subset_size=len(calibration),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER,
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=left_out, validate=False),
            advanced_parameters=AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=_NO_SMOOTHING, convolution=_NO_SMOOTHING)
            ),
        )


_QUANTIZED_BY_NNCF = frozenset({"MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "Gather"})
# NNCF's way of saying that SmoothQuant is off: it raised the error of SANA's steps by a half (docs/log.md).
_NO_SMOOTHING = -1


def _with_kept(quantized: Any, model: Any, layers: Iterable[Layer], kept: frozenset[str]) -> Any:
    """A copy of the quantized model in which the layers of `kept` read the original's weights, biases and unquantized inputs.

    What a new quantization without them would give, in no time.
    """
    copy = quantized.clone()
    originals = {op.get_friendly_name(): op for op in model.get_ops()}
    ops = {op.get_friendly_name(): op for op in copy.get_ops()}
    for name in kept:
        original, op = originals[name], ops[name]
        source = original.input_value(0)
        op.input(0).replace_source_output(ops[source.get_node().get_friendly_name()].output(source.get_index()))
        op.input(1).replace_source_output(_constant(original.input_value(1)))
        _restore_bias(op, originals)
    still = frozenset(layer.name for layer in layers) - kept
    for op in copy.get_ops():
        if op.get_type_name() == "FakeQuantize" and not _reaches(op, still):
            for target in op.output(0).get_target_inputs():
                target.replace_source_output(op.input_value(0))
    copy.validate_nodes_and_infer_types()
    return copy


def _reaches(op: Any, names: frozenset[str]) -> bool:
    """Whether a result of `op` is read by an operator of that name, be it through operators that only move data."""
    for output in op.outputs():
        for target in output.get_target_inputs():
            reader = target.get_node()
            if reader.get_friendly_name() in names:
                return True
            if reader.get_type_name() in _MOVES and _reaches(reader, names):
                return True
    return False


def _restore_bias(op: Any, originals: dict[str, Any]) -> None:
    """Undoes the correction of a constant that is added to the layer's result: it made up for the layer's own errors."""
    for target in op.output(0).get_target_inputs():
        addition = target.get_node()
        original = originals.get(addition.get_friendly_name())
        if addition.get_type_name() == "Add" and original is not None and original.get_type_name() == "Add":
            for port in (0, 1):
                if original.input_value(port).get_node().get_type_name() == "Constant":
                    addition.input(port).replace_source_output(_constant(original.input_value(port)))


def _constant(source: Any) -> Any:
    """A new constant with what a reader of `source` has."""
    folded = ov.Model([source], [])
    request = ov.Core().compile_model(folded, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    request.infer()
    return ov.op.Constant(np.array(request.get_output_tensor(0).data)).output(0)


def _outputs(model: Any, feeds: Calibration, hint: str) -> list[Outputs]:
    """What the engine gives for each feed."""
    compiled = ov.Core().compile_model(model, "CPU", {**_THREADS, "INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()
    results: list[Outputs] = []
    for feed in feeds:
        request.infer(feed, share_inputs=True)
        results.append({port.any_name: np.array(request.get_tensor(port).data) for port in compiled.outputs})
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps NNCF's notes and progress bars off the terminal, where ours are."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        with quiet("nncf"):
            yield
    finally:
        console.quiet = before
