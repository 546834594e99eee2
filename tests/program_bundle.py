"""Bundles whose engines are torch programs that were never exported: the whole build and runtime around them, in seconds.

What an export does to a program is another test's business; here are the host's half, the programs and the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.programs import ProgramBackend, ProgramEngine
from mc_export.build import BuildOptions, build_bundle
from mc_export.build.options import EngineChoice
from mc_export.build.parts import Part
from mc_export.program.base import Program
from mc_runtime import Runtime
from mc_runtime.backends.base import Engine
from mc_runtime.bundle.decode import encode
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import MeasuredError, Precision

_PROGRAMS: dict[str, Program] = {}


class _FiledPrograms(ProgramBackend):
    """Finds a program under the name that its file holds."""

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        return ProgramEngine(_PROGRAMS[files[0].read_text(encoding="utf-8")])


def _program_engine(part: Part, choice: EngineChoice, directory: Path, *_: Any) -> dict[str, Any]:
    """In place of `make_engine`."""
    program = part.make().eval()
    key = f"{part.component} {len(_PROGRAMS)}"
    _PROGRAMS[key] = program
    file = directory / f"{part.component}.program"
    file.write_text(key, encoding="utf-8")
    spec = EngineSpec(
        target="onnxruntime", precision=Precision.FP32, files=(file.name,), inputs=program.inputs, outputs=program.outputs,
        error=MeasuredError(max_abs=0.0, relative_l2=0.0), lora=program.groups,
    )  # fmt: skip
    return {"engine": encode(spec), "seconds": 0.0}


@contextmanager
def programs_as_engines(cache: Path) -> Iterator[Callable[..., Runtime]]:
    """`build(checkpoint, folder, **options)` in this context, where its runtimes work; `cache` is of no other build."""
    with (
        mock.patch.dict("os.environ", MC_RUNTIME_CACHE=str(cache)),
        mock.patch("mc_export.build.placing.make_engine", _program_engine),
        mock.patch("mc_runtime.runtime.engines.create_backend", lambda _, settings: _FiledPrograms(settings)),
    ):

        def build(checkpoint: Path, folder: Path, **options: Any) -> Runtime:
            build_bundle(checkpoint, folder, BuildOptions(**{"max_steps": 4, "max_batch": 2} | options))
            return Runtime.load(folder, threads=1)

        yield build
