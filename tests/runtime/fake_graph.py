"""ONNX graphs of a few nodes, written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mc_runtime.bundle.manifest import Tensor


class Graph:
    """Nodes, constants and the signature of a small graph."""

    def __init__(self, inputs: dict[str, tuple[str, tuple[Any, ...]]], outputs: dict[str, tuple[Any, ...]]) -> None:
        self.inputs = [Tensor(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in inputs.items()]
        self.outputs = [Tensor(name=name, dtype="float32", shape=shape) for name, shape in outputs.items()]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def const(self, value: Any, dtype: type = np.float32) -> str:
        name = f"const{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        output = to or f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def float(self, name: str) -> str:
        output = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [name], [output], to=TensorProto.FLOAT))
        return output

    def grown(self, name: str, *axes: int) -> str:
        return self.op("Unsqueeze", name, self.const(axes, np.int64))

    def mean(self, name: str, *axes: int) -> str:
        return self.op("ReduceMean", name, self.const(axes, np.int64), keepdims=0)

    def sum(self, name: str, *axes: int) -> str:
        return self.op("ReduceSum", name, self.const(axes, np.int64), keepdims=0)

    def model(self, fixed: dict[str, int]) -> onnx.ModelProto:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        values = [
            [helper.make_tensor_value_info(t.name, types[t.dtype], [fixed.get(d, d) for d in t.shape]) for t in side]
            for side in (self.inputs, self.outputs)
        ]
        graph = helper.make_graph(self.nodes, "fake", *values, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
