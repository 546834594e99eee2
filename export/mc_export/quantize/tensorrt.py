"""Int8 for TensorRT: pairs of quantize and dequantize around the inputs and weights of products and convolutions.

TensorRT takes int8 as such pairs alone, symmetric on both sides, with ranges that are known when it builds. So activations have
calibrated ranges, unlike onnxruntime's own int8, which measures them in every run. onnxruntime runs the same graph, so what
is kept in float32, and the error of the whole, are measured on it without a GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

from mc_export.lower import Calibration
from mc_export.quantize.onnxruntime import (
    KINDS,
    CalibrationReader,
    is_large,
    outputs_of,
    quantizable_layers,
    save_graph,
    with_kept,
)
from mc_export.quantize.policy import GATE, described, split
from mc_export.quantize.sensitivity import choose_kept, relative_error
from mc_export.quiet import quiet
from mc_runtime.bundle.atomic import full_disk_is_said

# Outputs stay float: what reads them rounds them itself where it is quantized. Biases too: TensorRT adds them in float32.
_SYMMETRIC = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "OpTypesToExcludeOutputQuantization": list(KINDS),
}


def quantize_tensorrt(onnx_path: Path, out_path: Path, inputs: Calibration, component: str) -> dict[str, Any]:
    """Quantizes layers with constant weights, as many as the component's gate allows: weights s8 per channel, inputs s8.

    Products of two activations and depthwise convolutions stay in float32.

    Args:
        onnx_path: the float32 graph.
        out_path: where the quantized one goes; its weights beside it where they are large.
        inputs: what the engine is given in real requests.
        component: its name.

    Returns:
        What was quantized, for the engine's options in the manifest.

    Raises:
        EngineError: there is nothing to calibrate on.
    """
    feeds = split(inputs, component)
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".quantizing-") as folder, full_disk_is_said(Path(folder)):
        scratch = Path(folder)
        model = onnx.load(onnx_path)
        # Stale shapes inside a graph with dynamic sizes fail the quantizer's shape inference.
        del model.graph.value_info[:]
        plain, full, trial = (scratch / f"{name}.onnx" for name in ("plain", "full", "trial"))
        save_graph(model, plain)
        layers = quantizable_layers(model, scratch, feeds.held_out[0])
        references = outputs_of(plain, feeds.held_out)
        with quiet("root"):  # advice on preparations that are made here
            quantize_static(
                str(plain),
                str(full),
                CalibrationReader(feeds.calibration),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(KINDS),
                nodes_to_quantize=[layer.name for layer in layers],
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                use_external_data_format=is_large(plain),
                extra_options=dict(_SYMMETRIC),
            )

        def quantize(path: Path, kept: frozenset[str]) -> None:
            save_graph(with_kept(onnx.load(full), model, kept, behind=False), path)

        def probe(kept: frozenset[str]) -> float:
            quantize(trial, kept)
            return relative_error(outputs_of(trial, feeds.held_out), references)

        selection = choose_kept(layers, probe, GATE[component])
        quantize(out_path, frozenset(selection.kept))
    return described(selection, len(feeds.calibration))
