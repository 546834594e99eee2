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
    """Stores the codes of weights, which torch has in 8 bits, in 4; returns how many weights there are.

    A layer that is run twice has its weights twice: where two products of matrices read the same ones, as of Wan's timesteps,
    TensorRT for RTX (1.7) ends the process.
    """
    packed = 0
    for node in list(model.graph.all_nodes()):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.const_value is None or not node.attributes.get_int("block_size", 0):
            continue
        if codes.dtype == ir.DataType.INT8:  # not one that several nodes read and that is packed already
            codes.const_value = ir.Tensor(codes.const_value.numpy().astype(ml_dtypes.int4), name=codes.name)
            codes.dtype = ir.DataType.INT4
        packed += 1
        for reader, place in list(node.outputs[0].uses())[1:]:
            again = _copy(node, packed)
            reader.replace_input_with(place, again.outputs[0])
            packed += 1
    return packed


def _copy(node: ir.Node, number: int) -> ir.Node:
    """The same node on constants of its own, in the same graph."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    inputs = []
    for value in node.inputs:
        assert value is not None
        assert value.const_value is not None
        name = f"{value.name}.again_{number}"
        constant = ir.Tensor(value.const_value.numpy(), dtype=value.dtype, name=name)
        own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=constant)
        graph.register_initializer(own)
        inputs.append(own)
    (result,) = node.outputs
    output = ir.Value(name=f"{result.name}.again_{number}", shape=result.shape, type=result.type)
    again = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=[output], version=node.version)
    graph.insert_after(node, again)
    return again
