"""Torch programs in the place of engines, for a runtime whose bundle was not exported, or not altogether."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mc_export.program.base import Program
from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor


class ProgramEngine(Engine):
    """A torch program as an engine on the host."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.component, Path(program.component))
        self.program = program

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        return self.program.inputs, self.program.outputs

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        feed = {spec.name: inputs[spec.name].native for spec in self.program.inputs}
        results = {name: output.contiguous() for name, output in self.program.run(feed).items()}
        return {name: Buffer(one, tuple(one.shape), np.dtype("float32"), one.numpy()) for name, one in results.items()}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        return _Bound(self, inputs, outputs)


class _Bound(Call):
    def __init__(self, engine: ProgramEngine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._engine, self._inputs, self._outputs = engine, inputs, outputs

    def run(self) -> None:
        for name, result in self._engine.run(self._inputs).items():
            self._outputs[name].native.copy_(result.native)


class ProgramBackend(HostBackend):
    """Buffers of torch on the host."""

    name = "onnxruntime"

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """Programs are not loaded from files."""
        raise TypeError(f"{component}: a program is given, not loaded")

    def wrap(self, array: Array) -> torch.Tensor:
        """See `HostBackend.wrap`."""
        return torch.from_numpy(array)
