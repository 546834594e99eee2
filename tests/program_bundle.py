"""Bundles whose engines are torch programs that were never exported: the whole build and runtime around them, in seconds.

What an export does to a program is another test's business; here are the host's half, the programs and the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mc_export.build import BuildOptions, build_bundle
from mc_export.build.options import EngineChoice
from mc_export.build.parts import Part
from mc_export.lora import AdaptedProgram
from mc_export.program.base import Program
from mc_runtime import Runtime
from mc_runtime.backends.base import Array, Buffer, Call, Engine, HostBackend
from mc_runtime.bundle.decode import encode
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import MeasuredError, Precision, Tensor

_PROGRAMS: dict[str, Program] = {}


class _ProgramEngine(Engine):
    """A program under the name that its file holds."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(name, path)
        self.program = _PROGRAMS[path.read_text(encoding="utf-8")]

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.program.inputs, self.program.outputs

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        feed = {spec.name: inputs[spec.name].native for spec in self.program.inputs}
        results = {name: output.contiguous() for name, output in self.program.run(feed).items()}
        return {name: Buffer(one, tuple(one.shape), np.dtype("float32"), one.numpy()) for name, one in results.items()}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        return _BoundProgram(self, inputs, outputs)


class _BoundProgram(Call):
    def __init__(self, engine: _ProgramEngine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        self._engine, self._inputs, self._outputs = engine, inputs, outputs

    def run(self) -> None:
        for name, result in self._engine.run(self._inputs).items():
            self._outputs[name].native.copy_(result.native)


class _ProgramBackend(HostBackend):
    name = "onnxruntime"

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        return _ProgramEngine(component, files[0])

    def wrap(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array)


def _program_engine(part: Part, choice: EngineChoice, directory: Path, *_: Any) -> dict[str, Any]:
    """In place of `make_engine`."""
    program = part.make().eval()
    key = f"{part.component} {len(_PROGRAMS)}"
    _PROGRAMS[key] = program
    file = directory / f"{part.component}.program"
    file.write_text(key, encoding="utf-8")
    spec = EngineSpec(
        target="onnxruntime", precision=Precision.FP32, files=(file.name,), inputs=program.inputs, outputs=program.outputs,
        error=MeasuredError(max_abs=0.0, relative_l2=0.0), lora=program.groups if isinstance(program, AdaptedProgram) else (),
    )  # fmt: skip
    return {"engine": encode(spec), "seconds": 0.0}


@contextmanager
def programs_as_engines(cache: Path) -> Iterator[Callable[..., Runtime]]:
    """`build(checkpoint, folder, **options)` in this context, where its runtimes work; `cache` is of no other build."""
    with (
        mock.patch.dict("os.environ", MC_RUNTIME_CACHE=str(cache)),
        mock.patch("mc_export.build.placing.make_engine", _program_engine),
        mock.patch("mc_runtime.runtime.engines.create_backend", lambda _, settings: _ProgramBackend(settings)),
    ):

        def build(checkpoint: Path, folder: Path, **options: Any) -> Runtime:
            build_bundle(checkpoint, folder, BuildOptions(**{"max_steps": 4, "max_batch": 2} | options))
            return Runtime.load(folder, threads=1)

        yield build
