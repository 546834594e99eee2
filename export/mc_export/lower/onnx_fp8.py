"""The ONNX form of `mc_kernels.fp8_round`: pairs of quantize and dequantize, of which TensorRT makes FP8 products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset22 as op

import mc_kernels.fp8_round  # noqa: F401  # registers the operators

_E4M3 = int(onnx.TensorProto.FLOAT8E4M3FN)


def _round(x: Any, scale: Any) -> Any:
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, output_dtype=_E4M3), scale)


def _weights(codes: Any, scale: Any) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`; the graph has to be of opset 22."""
    return {torch.ops.mc_kernels.fp8_round.default: _round, torch.ops.mc_kernels.fp8_weights.default: _weights}
