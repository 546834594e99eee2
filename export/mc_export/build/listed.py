"""How the manifest lists an engine that was just made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mc_export.build.options import EngineChoice
from mc_export.program.base import Program
from mc_runtime.bundle.manifest import Engine


def listed_engine(program: Program, choice: EngineChoice, files: Sequence[Path], options: Mapping[str, Any]) -> Engine:
    """The engine of a program, its error not yet measured."""
    return Engine(
        target=choice.target,
        precision=choice.precision,
        files=tuple(file.name for file in files),
        inputs=program.inputs,
        outputs=program.outputs,
        options=dict(options),
        lora=program.groups,
    )
