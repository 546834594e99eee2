"""OpenVINO on the CPU: inference requests whose tensors are numpy memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend, Settings
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision, Tensor

_DTYPES = {"f32": "float32", "i64": "int64"}

# What the arithmetic between quantized layers runs in. Without a hint OpenVINO takes bf16 wherever the CPU
# has it, also for an fp32 engine.
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "f32"}


class OpenVinoBackend(HostBackend):
    """Engine options: `properties`, OpenVINO's own, such as `INFERENCE_PRECISION_HINT` for what int8 layers leave over."""

    name = "openvino"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._core = ov.Core()

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`."""
        return OpenVinoEngine(component, files[0], self._core, self._properties(spec))

    def wrap(self, array: Array) -> Any:
        """An OpenVINO tensor over the array's memory."""
        return ov.Tensor(array, shared_memory=True)

    def _properties(self, spec: EngineSpec) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _HINTS[spec.precision],
        }
        if self.settings.threads:
            properties["INFERENCE_NUM_THREADS"] = self.settings.threads
        if self.settings.cache_dir:
            properties["CACHE_DIR"] = str(self.settings.cache_dir)
        return properties | dict(spec.options.get("properties", {}))


class OpenVinoEngine(Engine):
    """One compiled model."""

    def __init__(self, name: str, path: Path, core: Any, properties: dict[str, Any]) -> None:
        super().__init__(name, path)
        try:
            # Compiling from the path, not from a model read before, lets a cached compilation skip the
            # reading.
            self._model = core.compile_model(str(path), "CPU", properties)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            self.fail("does not load", error)

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        return tuple(map(_tensor, self._model.inputs)), tuple(map(_tensor, self._model.outputs))

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        request = self._model.create_infer_request()
        try:
            for name, buffer in (*inputs.items(), *outputs.items()):
                request.set_tensor(name, buffer.native)
        except Exception as error:
            self.fail("does not take its tensors", error)
        return _BoundCall(self, request, (*inputs.values(), *outputs.values()))

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        request = self._model.create_infer_request()
        try:
            for name, buffer in inputs.items():
                request.set_tensor(name, buffer.native)
            request.infer(share_outputs=True)
        except Exception as error:
            self.fail("failed", error)
        found = {}
        for output in self._model.outputs:
            # The request owns its outputs' memory and ends with this function.
            array = np.array(request.get_tensor(output).data)
            found[output.any_name] = Buffer(ov.Tensor(array, shared_memory=True), array.shape, array.dtype, array)
        return found


class _BoundCall(Call):
    def __init__(self, engine: OpenVinoEngine, request: Any, buffers: tuple[Buffer, ...]) -> None:
        self._engine = engine
        self._request = request
        self._buffers = buffers  # the request reads and writes their memory: they live as long as it does

    def run(self) -> None:
        try:
            self._request.infer(share_outputs=True)
        except Exception as error:
            self._engine.fail("failed", error)


def _tensor(port: Any) -> Tensor:
    shape = tuple(size.get_length() if size.is_static else "?" for size in port.partial_shape)
    kind = port.element_type.get_type_name()
    return Tensor(name=port.any_name, dtype=_DTYPES.get(kind, kind), shape=shape)
