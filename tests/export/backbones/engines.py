"""A program's graph in onnxruntime and OpenVINO, against the program itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import openvino as ov

from mc_export.lower.onnx import onnx_from_program
from mc_export.lower.openvino import save_openvino
from mc_export.program.base import Program
from mc_export.program.export import export_program


class Graph:
    """A program exported once, its sizes dynamic."""

    def __init__(self, program: Program, file: Path) -> None:
        self.program = program
        self.path = onnx_from_program(export_program(program), program.inputs, program.outputs, file).path
        self._session = ort.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])

    def onnxruntime_error(self, extents: Mapping[str, int], seed: int = 5) -> float:
        """The largest relative L2 over the outputs, in float32."""
        feed = self.program.example(extents, seed=seed)
        arrays = {name: tensor.numpy() for name, tensor in feed.items()}
        return self._error(feed, dict(zip([spec.name for spec in self.program.outputs], self._session.run(None, arrays))))  # noqa: B905

    def openvino_error(self, extents: Mapping[str, int], hint: str, seed: int = 5) -> float:
        """The same for OpenVINO; ``hint`` is ``f32`` or ``bf16``."""
        feed = self.program.example(extents, seed=seed)
        core = ov.Core()
        xml, _ = save_openvino(core.read_model(str(self.path)), self.path.with_suffix(".xml"))
        model = core.read_model(str(xml))
        model.reshape({name: list(tensor.shape) for name, tensor in feed.items()})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        results = compiled({name: tensor.numpy() for name, tensor in feed.items()})
        return self._error(feed, {spec.name: results[spec.name] for spec in self.program.outputs})

    def _error(self, feed: Mapping[str, object], results: Mapping[str, np.ndarray]) -> float:
        expected = self.program.run(feed)  # type: ignore[arg-type]
        return max(relative_l2(results[name], tensor.numpy()) for name, tensor in expected.items())


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """The error's norm by the expected numbers'."""
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
