"""OpenVINO on the CPU: inference requests whose tensors are numpy memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend, Settings, Shapes
from mc_runtime.bundle.engines import STEPS
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision, Tensor

_DEVICE = "CPU"
_DTYPES = {"f32": "float32", "i64": "int64"}

# What the arithmetic between quantized layers runs in. Without a hint OpenVINO takes bf16 wherever the CPU
# has it, also for an fp32 engine.
_HINTS = {Precision.FP32: "f32", Precision.BF16: "bf16", Precision.INT8: "f32"}


# Engines that are compiled for each shape they meet. Against one compilation for any shape, a step then takes
# 5 % (fp32) to 15 % (bf16) less time with 512 channels and 1024 tokens, a third less with 64 channels and 64
# tokens, and loads faster. Engines that read text meet another length with every prompt.
_SPECIALISED = frozenset({*STEPS, "vae_decoder", "vae_decoder_next", "vae_encoder", "vae_encoder_next"})
# A compilation holds the weights again, in the layout its kernels want: as many are kept as fit here, from 2
# to 8.
_KEPT_BYTES = 2**30


class OpenVinoBackend(HostBackend):
    """Options of an engine in the manifest.

    `properties` are OpenVINO's own, such as `INFERENCE_PRECISION_HINT` for what int8 layers leave over;
    `specialise` is for how many input shapes at a time the model is compiled, 0 for one compilation that
    takes any.
    """

    name = "openvino"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._core = ov.Core()

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`."""
        kept = spec.options.get("specialise", _kept(files) if component in _SPECIALISED else 0)
        return OpenVinoEngine(component, files[0], self._core, self._properties(spec), kept)

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
    """One model, compiled once for any shape, or for each of the last `kept` shapes it met."""

    def __init__(self, name: str, path: Path, core: Any, properties: dict[str, Any], kept: int) -> None:
        super().__init__(name, path)
        self._core = core
        self._properties = properties
        self._kept = kept
        self._compiled: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        try:
            # Compiling from the path, not from a model read before, lets a cached compilation skip the
            # reading.
            self._model = core.read_model(str(path)) if kept else core.compile_model(str(path), _DEVICE, properties)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            self.fail("does not load", error)

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        return tuple(map(_tensor, self._model.inputs)), tuple(map(_tensor, self._model.outputs))

    def prepare(self, shapes: Shapes) -> None:
        """See `Engine.prepare`."""
        self._model_for(shapes)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        request = self._request(inputs)
        try:
            for name, buffer in outputs.items():
                request.set_tensor(name, buffer.native)
        except Exception as error:
            self.fail("does not take its outputs", error)
        return _BoundCall(self, request, (*inputs.values(), *outputs.values()))

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        request = self._request(inputs)
        _BoundCall(self, request, tuple(inputs.values())).run()
        found = {}
        for output in self._model.outputs:
            # The request owns its outputs' memory and ends with this function.
            array = np.array(request.get_tensor(output.any_name).data)
            found[output.any_name] = Buffer(ov.Tensor(array, shared_memory=True), array.shape, array.dtype, array)
        return found

    def _request(self, inputs: Mapping[str, Buffer]) -> Any:
        request = self._model_for({name: buffer.shape for name, buffer in inputs.items()}).create_infer_request()
        try:
            for name, buffer in inputs.items():
                request.set_tensor(name, buffer.native)
        except Exception as error:
            self.fail("does not take its inputs", error)
        return request

    def _model_for(self, shapes: Shapes) -> Any:
        """The compiled model for these shapes; the least recently used one makes room for a new one."""
        if not self._kept:
            return self._model
        key = tuple(sorted(shapes.items()))
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(shapes)
            self._compiled.move_to_end(key)
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
            return self._compiled[key]

    def _compile(self, shapes: Shapes) -> Any:
        try:
            model = self._model.clone()  # shares the weights
            model.reshape({name: list(shape) for name, shape in shapes.items()})
            return self._core.compile_model(model, _DEVICE, self._properties)
        except Exception as error:
            self.fail(f"cannot be compiled for {dict(shapes)}", error)


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


def _kept(files: tuple[Path, ...]) -> int:
    weights = sum(file.stat().st_size for file in files)
    return min(8, max(2, _KEPT_BYTES // max(1, weights)))


def _tensor(port: Any) -> Tensor:
    shape = tuple(size.get_length() if size.is_static else "?" for size in port.partial_shape)
    kind = port.element_type.get_type_name()
    return Tensor(name=port.any_name, dtype=_DTYPES.get(kind, kind), shape=shape)
