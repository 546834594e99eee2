"""onnxruntime on the CPU: sessions with inputs and outputs bound to numpy memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnxruntime as ort

from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend, Settings
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import BundleError

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64"}
_ERROR = 3  # onnxruntime's severity: its warnings about unused initialisers are the build's business
_PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntimeBackend(HostBackend):
    """Engine options: `session` (session config entries) and `graph_optimization` (`all`, `extended`, `basic`, `none`)."""

    name = "onnxruntime"

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`."""
        return OnnxRuntimeEngine(component, files[0], session_options(component, spec, self.settings))

    def wrap(self, array: Array) -> Any:
        """An OrtValue over the array's memory."""
        return ort.OrtValue.ortvalue_from_numpy(array)


def session_options(component: str, spec: EngineSpec, settings: Settings) -> Any:
    """How an engine's session runs. Raises BundleError where the manifest's options are not onnxruntime's."""
    options = ort.SessionOptions()
    options.log_severity_level = _ERROR
    options.intra_op_num_threads = settings.threads or 0
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    try:
        options.graph_optimization_level = _level(spec.options.get("graph_optimization", "all"))
        # Threads go on waiting actively after a run, as is the default: a step of some milliseconds then takes 16 % less
        # time than with `session.intra_op.allow_spinning` 0. Where other processes want the same cores it is twice as
        # slow, and that entry the better choice.
        for key, value in spec.options.get("session", {}).items():
            options.add_session_config_entry(key, str(value))
    except (AttributeError, KeyError, TypeError) as error:
        what = f"{component} engine: options {spec.options} are not onnxruntime's"
        raise BundleError(f"{what}; build the bundle again") from error
    return options


class SessionEngine(Engine):
    """An onnxruntime session, on whatever device."""

    session: Any

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        inputs = tuple(_tensor_of(node) for node in self.session.get_inputs())
        outputs = tuple(_tensor_of(node) for node in self.session.get_outputs())
        return inputs, outputs

    def bound(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer] = MappingProxyType({})) -> Any:
        """onnxruntime's I/O binding, tied to these buffers. Raises EngineError."""
        binding = self.session.io_binding()
        try:
            for name, buffer in inputs.items():
                binding.bind_ortvalue_input(name, buffer.native)
        except Exception as error:
            self.fail("does not take its inputs", error)
        try:
            for name, buffer in outputs.items():
                binding.bind_ortvalue_output(name, buffer.native)
        except Exception as error:
            self.fail("does not take its outputs", error)
        return binding


class OnnxRuntimeEngine(SessionEngine):
    """A session on the CPU."""

    def __init__(self, name: str, path: Path, options: Any) -> None:
        super().__init__(name, path)
        try:
            self.session = ort.InferenceSession(str(path), options, providers=_PROVIDERS)
        except Exception as error:  # onnxruntime raises its own types, one a status code
            self.fail("does not load", error)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        return _BoundCall(self, self.bound(inputs, outputs))

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        binding = self.bound(inputs)
        names = [node.name for node in self.session.get_outputs()]
        for name in names:
            binding.bind_output(name)
        _BoundCall(self, binding).run()
        arrays = [np.asarray(value.numpy()) for value in binding.get_outputs()]
        natives = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]
        return {
            name: Buffer(native, array.shape, array.dtype, array)
            for name, native, array in zip(names, natives, arrays, strict=True)
        }


class _BoundCall(Call):
    def __init__(self, engine: OnnxRuntimeEngine, binding: Any) -> None:
        self._engine = engine
        self._binding = binding

    def run(self) -> None:
        try:
            self._engine.session.run_with_iobinding(self._binding)
        except Exception as error:
            self._engine.fail("failed", error)


def _level(name: str) -> Any:
    levels = ort.GraphOptimizationLevel
    return {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
    }[name]


def _tensor_of(node: Any) -> Tensor:
    """A session's input or output."""
    shape = tuple(size if isinstance(size, int) else str(size or "?") for size in node.shape)
    return Tensor(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)
