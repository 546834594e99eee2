"""Int8 for onnxruntime, by its own quantizers: products by the ranges of each run, convolutions by calibrated ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from mc_export.lower import Calibration
from mc_export.lower.onnx import EXTERNAL_DATA_THRESHOLD
from mc_export.quantize.pointwise import drop_unused_weights, pointwise_to_products, transpose_weights_once
from mc_export.quantize.policy import GATE, described, split
from mc_export.quantize.sensitivity import Layer, Outputs, choose_kept, relative_error
from mc_export.quiet import quiet
from mc_runtime.bundle.atomic import full_disk_is_said

KINDS = ("MatMul", "Gemm", "Conv")
"""The operators that are quantized."""


def quantize_onnxruntime(onnx_path: Path, out_path: Path, inputs: Calibration, component: str) -> dict[str, Any]:
    """Quantizes layers with constant weights, as many as the component's gate allows: weights s8 per channel, inputs u8.

    Products measure the range of their input in every run: on SANA that was faster and three times as exact as calibrated
    ranges (docs/log.md). Convolutions have no such form and get calibrated ranges. Products of two activations and depthwise
    convolutions stay in float.

    Args:
        onnx_path: the float32 graph.
        out_path: where the quantized one goes; its weights beside it where they are large.
        inputs: what the engine is given in real requests.
        component: its name.

    Returns:
        The engine's options for the manifest.

    Raises:
        EngineError: there is nothing to calibrate on.
    """
    feeds = split(inputs, component)
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".quantizing-") as folder, full_disk_is_said(Path(folder)):
        scratch = Path(folder)
        model = onnx.load(onnx_path)
        pointwise_to_products(model)
        transpose_weights_once(model)
        # Stale shapes inside a graph with dynamic sizes fail the quantizer's shape inference.
        del model.graph.value_info[:]
        plain, full, trial = (scratch / f"{name}.onnx" for name in ("plain", "full", "trial"))
        save_graph(model, plain)
        # Not `Gemm`, which onnxruntime's quantizer renames before it looks for the layers it is told: such products are of one
        # row a sample, timesteps and modulation, and are no work to save.
        layers = quantizable_layers(model, scratch, feeds.held_out[0], ("MatMul", "Conv"))
        references = outputs_of(plain, feeds.held_out)
        convolutions = {node.name for node in model.graph.node if node.op_type == "Conv"}
        _quantize_convolutions(plain, full, [layer.name for layer in layers if layer.name in convolutions], feeds.calibration)

        def quantize(path: Path, kept: frozenset[str]) -> None:
            restored = scratch / "restored.onnx"
            save_graph(with_kept(onnx.load(full), model, kept & convolutions), restored)
            _quantize_products(restored, path, [layer.name for layer in layers if layer.name not in kept | convolutions])

        def probe(kept: frozenset[str]) -> float:
            quantize(trial, kept)
            return relative_error(outputs_of(trial, feeds.held_out), references)

        selection = choose_kept(layers, probe, GATE[component])
        quantize(out_path, frozenset(selection.kept))
    return described(selection, len(feeds.calibration))


def quantizable_layers(
    model: onnx.ModelProto, scratch: Path, feed: dict[str, np.ndarray[Any, Any]], kinds: Sequence[str] = KINDS
) -> list[Layer]:
    """The products and convolutions with constant weights, in graph order, with their work on `feed`."""
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in kinds and _has_weights(node, weights)]
    shapes = _shapes(model, [node.output[0] for node in nodes], scratch, feed)
    layers = []
    for node in nodes:
        dims = weights[node.input[1]].dims
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("group", 1) != 1:
            continue
        outputs = dims[0] if node.op_type == "Conv" or attributes.get("transB") else dims[-1]
        layers.append(Layer(node.name, float(prod(shapes[node.output[0]]) * prod(dims) // outputs)))
    return layers


def _has_weights(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether it has constant weights of a form that is quantized per channel: a product's are a matrix of more than one row,
    which leaves out rotary frequencies."""
    if node.input[1] not in weights:
        return False
    dims = weights[node.input[1]].dims
    return node.op_type == "Conv" or (len(dims) == 2 and min(dims) > 1)


def _shapes(
    model: onnx.ModelProto, names: Sequence[str], scratch: Path, feed: dict[str, np.ndarray[Any, Any]]
) -> dict[str, list[int]]:
    """Shapes of intermediate results, by asking for them: inference alone does not get through computed shapes."""
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    for name in names:
        asked.graph.node.append(helper.make_node("Shape", [name], [f"{name}_shape"], name=f"{name}_shape"))
    del asked.graph.output[:]
    asked.graph.output.extend(helper.make_tensor_value_info(f"{name}_shape", onnx.TensorProto.INT64, [None]) for name in names)
    path = scratch / "shapes.onnx"
    save_graph(asked, path)
    session = _session(path)
    found = session.run([f"{name}_shape" for name in names], _fed(session, feed))
    return {name: [int(size) for size in shape] for name, shape in zip(names, found, strict=True)}


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Hands the quantizer its inputs, one run after another."""

    def __init__(self, feeds: Calibration) -> None:
        self._feeds: Iterator[dict[str, np.ndarray[Any, Any]]] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self._feeds, None)


def _quantize_convolutions(plain: Path, path: Path, names: Sequence[str], calibration: Calibration) -> None:
    """Ranges of inputs and outputs as the calibration has them."""
    if not names:
        save_graph(onnx.load(plain), path)
        return
    with quiet("root"):  # advice on preparations that are made here
        quantize_static(
            str(plain),
            str(path),
            CalibrationReader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=list(names),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=is_large(plain),
        )


def _quantize_products(plain: Path, path: Path, names: Sequence[str]) -> None:
    """Ranges of inputs as every run has them."""
    if not names:
        save_graph(onnx.load(plain), path)
        return
    with quiet("root"):  # advice on preparations that are made here
        quantize_dynamic(
            str(plain),
            str(path),
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large(plain),
        )


def with_kept(
    quantized: onnx.ModelProto, model: onnx.ModelProto, kept: Iterable[str], *, behind: bool = True
) -> onnx.ModelProto:
    """The quantized graph, changed so that the nodes of `kept` compute in float and nobody reads rounded numbers without need.

    The quantizer puts a pair of nodes behind every result that a convolution reads or gives, and hands the rounded numbers to
    all who read it. The pair stays before a quantized node and, with `behind`, behind it, where onnxruntime needs it for a
    convolution's int8 kernel.
    """
    originals = {node.name: node for node in model.graph.node}
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    wanted = frozenset(kept)
    for node in quantized.graph.node:
        if node.name in wanted:
            _restore_weights(quantized, node, originals[node.name], weights)
    makers = {name: node for node in quantized.graph.node for name in node.output}
    quantized_nodes = {node.name for node in quantized.graph.node if _reads_int8_weights(node, makers)}
    plain: dict[str, str] = {}
    for node in quantized.graph.node:
        quantizer = makers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantizer is not None:
            maker = makers.get(quantizer.input[0])
            if maker is None or not behind or maker.name not in quantized_nodes:
                plain[node.output[0]] = quantizer.input[0]
    for node in quantized.graph.node:
        if node.name not in quantized_nodes:
            node.input[:] = [plain.get(name, name) for name in node.input]
    _drop_unread(quantized)
    return quantized


def _restore_weights(
    quantized: onnx.ModelProto, node: onnx.NodeProto, original: onnx.NodeProto, weights: dict[str, onnx.TensorProto]
) -> None:
    """Lets a node of the quantized graph read its float weights, under names of their own: a quantized bias is dequantized
    under the name that its initializer had."""
    there = {initializer.name for initializer in quantized.graph.initializer}
    for index, name in enumerate(original.input):
        if name not in weights:
            continue
        node.input[index] = f"{name}_float"
        if node.input[index] not in there:
            quantized.graph.initializer.append(weights[name])
            quantized.graph.initializer[-1].name = node.input[index]


def _reads_int8_weights(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    maker = makers.get(node.input[1]) if node.op_type in KINDS else None
    return maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] not in makers


def _drop_unread(model: onnx.ModelProto) -> None:
    """Removes quantize and dequantize nodes whose results nobody reads any more, and their weights."""
    outputs = {value.name for value in model.graph.output}
    while True:
        read = {name for node in model.graph.node for name in node.input} | outputs
        live = [node for node in model.graph.node if read.intersection(node.output)]
        if len(live) == len(model.graph.node):
            break
        del model.graph.node[:]
        model.graph.node.extend(live)
    drop_unused_weights(model)


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph; large weights go beside it."""
    if _weight_bytes(model) < EXTERNAL_DATA_THRESHOLD:
        onnx.save(model, path)
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # saving beside the graph empties the weights of what is saved
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    onnx.save(copy, path, save_as_external_data=True, location=f"{path.name}.data")


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(
        prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in model.graph.initializer
    )


def is_large(path: Path) -> bool:
    """Whether a graph's weights lie beside it."""
    return _weight_bytes(onnx.load(path, load_external_data=False)) >= EXTERNAL_DATA_THRESHOLD


def outputs_of(path: Path, feeds: Calibration) -> list[Outputs]:
    """What the engine gives for each feed."""
    session = _session(path)
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, _fed(session, feed)), strict=True)) for feed in feeds]


def _fed(session: Any, feed: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """What of the feed the graph reads."""
    return {value.name: feed[value.name] for value in session.get_inputs()}


def _session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
