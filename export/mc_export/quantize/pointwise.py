"""Graphs in the form that onnxruntime's quantizer needs.

1 x 1 convolutions become matrix products, which it quantizes without their outputs; weights are such that it transposes none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper


def pointwise_to_products(model: onnx.ModelProto) -> int:
    """Rewrites every 1 x 1 convolution with constant weights, in place, as transpose, product, bias, transpose.

    An int8 convolution of onnxruntime needs an int8 output too; an int8 product gives float. Where tokens are turned into a
    picture for the convolution, as in SANA's Mix-FFN, onnxruntime cancels the transposes.

    Returns:
        How many it rewrote.
    """
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights and _is_pointwise(node, weights[node.input[1]]):
            matrix = numpy_helper.to_array(weights[node.input[1]])[:, :, 0, 0].T
            model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), f"{node.name}_matrix"))
            nodes += _as_product(node)
            count += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused_weights(model)
    return count


def transpose_weights_once(model: onnx.ModelProto) -> int:
    """Lets every `Gemm` read its constant weights as `[in, out]`, in place.

    onnxruntime's quantizer transposes them once for each node that reads them. Where two share them, as the embeddings of Wan's
    noisy and clean frames do, they would end as they began, and the graph would not load.

    Returns:
        How many nodes it changed.
    """
    weights = {initializer.name: initializer for initializer in model.graph.initializer}
    transposed: set[str] = set()
    count = 0
    for node in model.graph.node:
        flag = next((attribute for attribute in node.attribute if attribute.name == "transB" and attribute.i), None)
        if node.op_type != "Gemm" or flag is None or node.input[1] not in weights:
            continue
        name = node.input[1]
        node.input[1] = f"{name}_transposed"
        flag.i = 0
        if name not in transposed:
            matrix = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
            model.graph.initializer.append(numpy_helper.from_array(matrix, node.input[1]))
            transposed.add(name)
        count += 1
    drop_unused_weights(model)
    return count


def drop_unused_weights(model: onnx.ModelProto) -> None:
    """Removes initializers that no node reads."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    used = [initializer for initializer in model.graph.initializer if initializer.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(used)


def _is_pointwise(node: NodeProto, weights: onnx.TensorProto) -> bool:
    attributes: dict[str, Any] = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return (
        list(weights.dims[2:]) == [1, 1]
        and attributes.get("group", 1) == 1
        and not any(attributes.get("pads", ()))
        and all(stride == 1 for stride in attributes.get("strides", ()))
    )


def _as_product(node: NodeProto) -> list[NodeProto]:
    name, source = node.name, node.input[0]
    nodes = [
        helper.make_node("Transpose", [source], [f"{name}_rows"], name=f"{name}_to_rows", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", [f"{name}_rows", f"{name}_matrix"], [f"{name}_product"], name=f"{name}_as_product"),
    ]
    result = f"{name}_product"
    if len(node.input) > 2 and node.input[2]:
        nodes.append(helper.make_node("Add", [result, node.input[2]], [f"{name}_biased"], name=f"{name}_bias"))
        result = f"{name}_biased"
    nodes.append(helper.make_node("Transpose", [result], [node.output[0]], name=f"{name}_from_rows", perm=[0, 3, 1, 2]))
    return nodes
