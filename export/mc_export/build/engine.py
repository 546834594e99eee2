"""One engine: from the checkpoint's weights to verified files."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mc_export.build.cache import build_entry, lookup
from mc_export.build.options import EngineChoice
from mc_export.build.parts import Part
from mc_export.build.progress import State
from mc_export.build.verify import verify_engine
from mc_export.lower import Calibration, lower, lower_program, takes_programs
from mc_export.lower.onnx import OnnxFile, onnx_from_program
from mc_export.program.base import Program
from mc_export.program.export import export_program
from mc_runtime.bundle.decode import decode, encode
from mc_runtime.bundle.manifest import Engine, Precision

# Graphs up to this many bytes of weights are kept too, so that another target or precision needs no new export.
_KEPT_GRAPH_BYTES = 1 << 29
# Real requests a quantized engine is verified on.
_VERIFIED_FEEDS = 4


def make_engine(
    part: Part,
    choice: EngineChoice,
    directory: Path,
    enter: Callable[[State], None],
    calibrate: Callable[[str], Calibration],
    graph_key: str,
) -> dict[str, Any]:
    """Builds and verifies one engine into `directory`.

    Args:
        part: what it is made of.
        choice: target and precision.
        directory: where its files go.
        enter: told of every state.
        calibrate: gives a component's calibration inputs; asked only where the precision is quantized.
        graph_key: content key of its ONNX graph; empty to export it anew whatever the cache has.

    Returns:
        The notes of its cache entry: the manifest's engine, with its measured error, and the seconds it took.

    Raises:
        EngineError: it cannot be exported, or its error exceeds the precision's tolerance.
    """
    start = time.monotonic()
    enter(State.LOADING)
    program = part.make()
    calibration: Calibration = []
    if takes_programs(choice.target):
        enter(State.LOWERING)
        files, options = lower_program(choice.target, program, choice.precision, directory)
        if choice.precision is not Precision.FP32:
            del program  # its weights are not what they were, and there may be no room for two
            gc.collect()
            program = part.make()
    else:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".lowering-") as scratch:
            onnx = _graph(program, Path(scratch), enter, graph_key)
            if choice.is_quantized:
                enter(State.CALIBRATING)
                calibration = calibrate(part.component)
                enter(State.QUANTIZING)
            files, options = lower(choice.target, onnx, part.component, choice.precision, calibration, directory)
    spec = Engine(
        target=choice.target,
        precision=choice.precision,
        files=tuple(file.name for file in files),
        inputs=program.inputs,
        outputs=program.outputs,
        options=options,
    )
    enter(State.VERIFYING)
    shapes = [program.example_extents, *program.check_extents()]
    examples = [program.example(extents, seed=10 + index) for index, extents in enumerate(shapes)]
    if choice.is_quantized:
        error = verify_engine(program, spec, files, _held_out(calibration, part.component), also_finite=examples)
    else:
        error = verify_engine(program, spec, files, examples)
    spec = replace(spec, error=error)
    return {"engine": encode(spec), "seconds": round(time.monotonic() - start, 2)}


def _held_out(calibration: Calibration, component: str) -> list[dict[str, torch.Tensor]]:
    """A few of the recorded inputs that the engine was not calibrated on."""
    from mc_export.quantize.policy import split

    feeds = split(calibration, component).held_out
    feeds = feeds[:: -(-len(feeds) // _VERIFIED_FEEDS)]
    return [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in feeds]


def _graph(program: Program, scratch: Path, enter: Callable[[State], None], key: str) -> OnnxFile:
    """The program's ONNX graph: from the cache, or exported into it, or, where it is large, into `scratch`."""
    name = f"{program.component}.onnx"

    def export(directory: Path) -> dict[str, Any]:
        enter(State.EXPORTING)
        exported = export_program(program)
        enter(State.LOWERING)
        onnx_from_program(exported, program.inputs, program.outputs, directory / name)
        return {}

    if not key or sum(weight.nbytes for weight in program.parameters()) > _KEPT_GRAPH_BYTES:
        export(scratch)
        gc.collect()  # the export holds the weights in a cycle
        return OnnxFile.at(scratch / name)
    entry = lookup(key) or build_entry(key, export)
    return OnnxFile.at(entry.directory / name)


def engine_of_notes(notes: Mapping[str, Any], folder: str) -> Engine:
    """The manifest's engine from a cache entry's notes, its files in `folder` of the bundle."""
    spec = decode(Engine, notes["engine"])
    return replace(spec, files=tuple(f"{folder}/{name}" for name in spec.files))
