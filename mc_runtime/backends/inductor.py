"""Packages of AOTInductor on the CPU: native code that reads weights mapped into memory. Nothing is compiled here."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend, Settings
from mc_runtime.backends.packages import METADATA_KEY, Package, check_shapes, signature_described
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor

_MODEL = "model"  # torch's name for a package's only model


class InductorBackend(HostBackend):
    """Engine options: see `mc_runtime.backends.packages.Package`; they are the build's and not for editing."""

    name = "inductor"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._threads = _Threads(settings.threads)

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`. Raises BundleError for a package of another torch or another CPU."""
        package = Package.of(component, spec)
        package.check_torch(files[0], torch.__version__)
        package.check_cpu(files[0])
        return InductorEngine(component, files, spec, package, self._threads)

    def wrap(self, array: Array) -> Any:
        """A tensor over the array's memory."""
        return torch.from_numpy(array)


class _Threads:
    """Sets how many threads torch takes. OpenMP keeps that number for each calling thread, so each is told once."""

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._told = threading.local()

    def tell(self) -> None:
        if self._count is not None and getattr(self._told, "count", None) != self._count:
            torch.set_num_threads(self._count)
            self._told.count = self._count


class InductorEngine(Engine):
    """One package with its weights; the weights' memory is the file's own."""

    def __init__(self, name: str, files: tuple[Path, ...], spec: EngineSpec, package: Package, threads: _Threads) -> None:
        super().__init__(name, files[0])
        self._spec = spec
        self._package = package
        self._threads = threads
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(files[0]), _MODEL, False, 1, -1)
            self._weights: dict[str, Any] = {}
            for file in files[1:]:
                self._weights |= load_file(str(file))
            if self._weights:
                # Complete or refused; the library keeps pointers, so the tensors live as long as this engine.
                self._loader.load_constants(self._weights, False, True, True)
            self._signature = signature_described(self._loader.get_metadata()[METADATA_KEY])
        except Exception as error:  # torch, safetensors and the dynamic linker each have their own
            self.fail("does not load", error)

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`; the package holds its own signature."""
        return self._signature

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        self._check(inputs)
        names = [tensor.name for tensor in self._spec.outputs]
        if set(names) != set(outputs):
            self.fail("does not give its outputs", ValueError(f"asked for {sorted(outputs)}, there are {sorted(names)}"))
        return _BoundCall(self, inputs, [outputs[name].native for name in names])

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        self._check(inputs)
        tensors = self.compute([inputs[tensor.name].native for tensor in self._spec.inputs])
        arrays = [tensor.contiguous().numpy() for tensor in tensors]
        return {
            spec.name: Buffer(torch.from_numpy(array), array.shape, array.dtype, array)
            for spec, array in zip(self._spec.outputs, arrays, strict=True)
        }

    def compute(self, tensors: list[Any]) -> list[Any]:
        """Outputs in the signature's order from inputs in its order, whose shapes were checked."""
        self._threads.tell()
        try:
            results: list[Any] = self._loader.run(tensors)
        except Exception as error:
            self.fail("failed", error)
        return results

    def _check(self, inputs: Mapping[str, Buffer]) -> None:
        found = {name: (buffer.shape, str(buffer.dtype)) for name, buffer in inputs.items()}
        check_shapes(self.name, self._spec, self._package, found)


class _BoundCall(Call):
    def __init__(self, engine: InductorEngine, inputs: Mapping[str, Buffer], outputs: list[Any]) -> None:
        self._engine = engine
        self._inputs = [inputs[tensor.name].native for tensor in engine._spec.inputs]
        self._outputs = outputs

    def run(self) -> None:
        for output, result in zip(self._outputs, self._engine.compute(self._inputs), strict=True):
            try:
                output.copy_(result)
            except RuntimeError as error:
                self._engine.fail("does not fit its outputs", error)
