"""Engine programs and graphs of the tiny checkpoints, each exported once a session: an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from mc_export.build.cache import build_entry, content_key, lookup
from mc_export.build.options import BuildOptions
from mc_export.build.parts import Limits, parts_of
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.lower.onnx import OnnxFile, onnx_from_program
from mc_export.program.base import Program
from mc_export.program.export import export_program
from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana

LIMITS = Limits(max_batch=4, max_tokens=16, max_canvas=8, planner_length=64, text_lengths=(128,), context_length=64, order=2)


class Exported(NamedTuple):
    """A program and its graph."""

    program: Program
    onnx: OnnxFile


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """`metacanvas` (conditioned on its planner, with a LoRA) and `stock` (with its text encoder)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "metacanvas": load_checkpoint(tiny_metacanvas_checkpoint(folder / "metacanvas", seed=11, lora=True)),
        "stock": load_checkpoint(tiny_stock_sana(folder / "stock", seed=12)),
    }


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Checkpoint]) -> Callable[[str, str], Exported]:
    """`exported(checkpoint, component)`."""

    @cache
    def export(checkpoint: str, component: str) -> Exported:
        options = BuildOptions(engines={component: BuildOptions().choice(component)})
        parts = {part.component: part for part in parts_of(checkpoints[checkpoint], LIMITS, options)}
        program = parts[component].make()

        def write(folder: Path) -> dict[str, str]:
            onnx_from_program(export_program(program), program.inputs, program.outputs, folder / "graph.onnx")
            return {}

        # By way of the cache, which the workers of a parallel run share.
        key = content_key({"graph of a test": [checkpoint, component], **asdict(LIMITS)})
        entry = lookup(key) or build_entry(key, write)
        return Exported(program, OnnxFile.at(entry.directory / "graph.onnx"))

    return export


def program_of(checkpoint: Path, component: str) -> Program:
    """One of a checkpoint's programs, for a sampler of order 1."""
    opened = load_checkpoint(checkpoint)
    options = BuildOptions(engines={component: BuildOptions().choice(component)})
    limits = replace(LIMITS, order=1)
    return {part.component: part for part in parts_of(opened, limits, options)}[component].make()
