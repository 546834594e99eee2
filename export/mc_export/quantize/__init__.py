"""Int8 engines by the libraries' own quantizers: calibration, what stays in float32, and one file a library."""

from __future__ import annotations

from typing import Any

__all__ = ["quantize_onnxruntime", "quantize_openvino", "quantize_tensorrt"]


def __getattr__(name: str) -> Any:
    # Each quantizer imports its library, and a build for one target needs only that one.
    if name == "quantize_onnxruntime":
        from mc_export.quantize.onnxruntime import quantize_onnxruntime

        return quantize_onnxruntime
    if name == "quantize_openvino":
        from mc_export.quantize.openvino import quantize_openvino

        return quantize_openvino
    if name == "quantize_tensorrt":
        from mc_export.quantize.tensorrt import quantize_tensorrt

        return quantize_tensorrt
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
