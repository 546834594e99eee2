"""The ONNX form of `mc_kernels.int4_weights`: dequantize by blocks, of weights that are stored in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import onnx_ir as ir
import torch
from onnxscript import opset22 as op

import mc_kernels.int4_weights  # noqa: F401  # registers the operator


def _weights(codes: Any, scale: Any, block: int) -> Any:
    return op.DequantizeLinear(codes, scale, axis=0, block_size=block)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`; the graph has to be of opset 21 or later."""
    return {torch.ops.mc_kernels.int4_weights.default: _weights}


def pack_codes(model: ir.Model) -> int:
    """Stores the codes of weights, which torch has in 8 bits, in 4; returns how many weights there are."""
    packed = 0
    for node in model.graph.all_nodes():
        if node.op_type != "DequantizeLinear" or not node.attributes.get_int("block_size", 0):
            continue
        codes = node.inputs[0]
        if codes is None or codes.const_value is None:
            continue
        if codes.dtype == ir.DataType.INT8:  # not one that several nodes read and that is packed already
            codes.const_value = ir.Tensor(codes.const_value.numpy().astype(ml_dtypes.int4), name=codes.name)
            codes.dtype = ir.DataType.INT4
        packed += 1
    return packed
