"""How the manifest lists an engine that was just made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_export.build.options import EngineChoice
from mc_export.program.base import Program
from mc_runtime.bundle.engines import LoraGroup
from mc_runtime.bundle.manifest import Engine, Tensor


@dataclass(frozen=True)
class Signature:
    """What the manifest says of a program, without the program and its weights."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    groups: tuple[LoraGroup, ...]

    @classmethod
    def of(cls, program: Program) -> Signature:
        """Of a program."""
        return cls(program.inputs, program.outputs, program.groups)


def listed_engine(
    program: Program | Signature, choice: EngineChoice, files: Sequence[Path], options: Mapping[str, Any]
) -> Engine:
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
