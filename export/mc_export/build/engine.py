"""One engine: from the checkpoint's weights to verified files."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mc_export.build.graph import cached_graph
from mc_export.build.listed import listed_engine
from mc_export.build.options import EngineChoice
from mc_export.build.parts import Part
from mc_export.build.plan import PlanWishes, ToLayers, as_it_is, make_plan
from mc_export.build.progress import State, StateClock
from mc_export.build.verify import held_out_feeds, verify_engine
from mc_export.lower import Calibration, lower, lower_program, takes_programs
from mc_export.lower.tensorrt import builds_plans
from mc_runtime.bundle.decode import decode, encode
from mc_runtime.bundle.manifest import Engine, Precision


def make_engine(
    part: Part,
    choice: EngineChoice,
    directory: Path,
    enter: Callable[[State], None],
    calibrate: Callable[[str], Calibration],
    graph_key: str,
    wishes: PlanWishes,
    tick: Callable[[float], None] = lambda share: None,
    to_layers: ToLayers = as_it_is,
) -> dict[str, Any]:
    """Builds and verifies one engine into `directory`.

    Args:
        part: what it is made of.
        choice: target and precision.
        directory: where its files go.
        enter: told of every state.
        calibrate: gives a component's calibration inputs; asked only where the precision is quantized.
        graph_key: content key of its ONNX graph; empty to export it anew whatever the cache has.
        wishes: what a TensorRT plan is built for.
        tick: told of the share of a state that is done, where a library tells it.
        to_layers: puts layers in FP8 or INT4 into a program and says what to note of it; asked only for these.

    Returns:
        The notes of its cache entry: the manifest's engine, with its measured error, and the seconds it took, also by state.

    Raises:
        EngineError: it cannot be exported, or its error exceeds the precision's tolerance.
    """
    start = time.monotonic()
    clock = StateClock(enter)
    enter = clock.enter
    enter(State.LOADING)
    if builds_plans(choice.target):
        spec = make_plan(
            part.make, choice, directory, wishes, enter=enter, tick=tick, calibrate=calibrate, to_layers=to_layers,
            graph_key=graph_key,
        )  # fmt: skip
        return {"engine": encode(spec), "seconds": round(time.monotonic() - start, 2), "states": clock.seconds()}
    program = part.make()
    calibration: Calibration = []
    if takes_programs(choice.target):
        notes: dict[str, Any] = {}
        if choice.is_by_layer:
            enter(State.CALIBRATING)
            calibration, notes = calibrate(part.component), to_layers(program)
        enter(State.LOWERING)
        files, options = lower_program(choice.target, program, choice.precision, directory)
        options |= notes
        if choice.precision is not Precision.FP32:
            del program  # its weights are not what they were, and there may be no room for two
            gc.collect()
            program = part.make()
    else:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".lowering-") as scratch:
            onnx = cached_graph(program, Path(scratch), enter, graph_key)
            if choice.is_quantized:
                enter(State.CALIBRATING)
                calibration = calibrate(part.component)
                enter(State.QUANTIZING)
            files, options = lower(choice.target, onnx, part.component, choice.precision, calibration, directory)
    spec = listed_engine(program, choice, files, options)
    enter(State.VERIFYING)
    shapes = [program.example_extents, *program.check_extents()]
    examples = [program.example(extents, seed=10 + index) for index, extents in enumerate(shapes)]
    if choice.is_quantized:
        error = verify_engine(program, spec, files, held_out_feeds(calibration, part.component), also_finite=examples)
    else:
        error = verify_engine(program, spec, files, examples)
    spec = replace(spec, error=error)
    return {"engine": encode(spec), "seconds": round(time.monotonic() - start, 2), "states": clock.seconds()}


def engine_of_notes(notes: Mapping[str, Any], folder: str) -> Engine:
    """The manifest's engine from a cache entry's notes, its files in `folder` of the bundle."""
    spec = decode(Engine, notes["engine"])
    return replace(spec, files=tuple(f"{folder}/{name}" for name in spec.files))
