"""One TensorRT plan: the program in its precision, its graph, the plan, and how exact it is."""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mc_export.build.graph import cached_graph
from mc_export.build.listed import Signature, listed_engine
from mc_export.build.options import BY_LAYER, EngineChoice
from mc_export.build.progress import State
from mc_export.build.verify import check_finite, held_out_feeds, runs_here, verify_engine, verify_results
from mc_export.lower import Calibration
from mc_export.lower.bf16 import compute_in
from mc_export.lower.onnx import OnnxFile
from mc_export.lower.tensorrt import PlanOrder, plan_file
from mc_export.lower.trt_profiles import profiles_of
from mc_export.program.base import Extents, Program
from mc_runtime.backends.trt_plans import Profile
from mc_runtime.bundle.manifest import Engine, MeasuredError, Precision

ToLayers = Callable[[Program], dict[str, Any]]
"""Puts layers in FP8 or INT4 into a program and says what to note of it."""


def as_it_is(program: Program) -> dict[str, Any]:
    """Of a program that has no such layer."""
    return {}


_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16} | dict.fromkeys(BY_LAYER, torch.bfloat16)


@dataclass(frozen=True)
class PlanWishes:
    """What a plan is built for beside its program.

    Attributes:
        usual: sizes that most requests have.
        served: the only ones a bundle serves; see `mc_export.lower.trt_profiles.profiles_of`.
        capabilities: compute capabilities; none for the target's own choice.
    """

    usual: Extents
    served: tuple[Extents, ...] = ()
    capabilities: tuple[str, ...] = ()


def make_plan(
    make: Callable[[], Program],
    choice: EngineChoice,
    directory: Path,
    wishes: PlanWishes,
    *,
    enter: Callable[[State], None],
    tick: Callable[[float], None],
    calibrate: Callable[[str], Calibration],
    to_layers: ToLayers = as_it_is,
    graph_key: str = "",
) -> Engine:
    """Builds and verifies one plan in `directory`.

    Where this machine can run it, it is compared with its float32 module like every engine. Where it cannot (no GPU, or another
    one), what is compared is what the plan was made of, in the same precision; the error says which it was.

    Args:
        make: loads the program; asked twice for 16 bits, which change its weights.
        choice: target and precision.
        directory: where the file goes.
        wishes: what it is built for.
        enter: told of every state.
        tick: told of the library's progress; what it raises stops the build.
        calibrate: gives a component's calibration inputs; asked only for int8, fp8 and int4.
        to_layers: puts layers in FP8 or INT4 into a program and says what to note of it; asked only for these.
        graph_key: content key of the graph; empty to export it anew.

    Returns:
        The manifest's engine, with its measured error.

    Raises:
        EngineError: it cannot be exported, read or built, or its error exceeds the precision's tolerance.
    """
    program = make()
    profiles = profiles_of(program.axes, wishes.usual, wishes.served)
    shapes = list(checked_extents(program, profiles))
    feeds = [program.example(extents, seed=10 + index) for index, extents in enumerate(shapes)]
    notes: dict[str, Any] = {}
    held_out: list[dict[str, torch.Tensor]] = []
    if choice.is_by_layer:
        enter(State.CALIBRATING)
        notes = to_layers(program)
        held_out = held_out_feeds(calibrate(program.component), program.component)
    if choice.precision in _DTYPES:
        program = compute_in(program, _DTYPES[choice.precision])
    with tempfile.TemporaryDirectory(dir=directory, prefix=".lowering-") as scratch:
        onnx = cached_graph(program, Path(scratch), enter, graph_key)
        if choice.precision is Precision.INT8:
            enter(State.CALIBRATING)
            calibration = calibrate(program.component)
            held_out = held_out_feeds(calibration, program.component)
            enter(State.QUANTIZING)
            onnx, notes = _quantized(onnx, calibration, program.component, Path(scratch))
        order = PlanOrder(
            program.component, choice.target, choice.precision, program.inputs, program.outputs, profiles,
            wishes.capabilities, tick,
        )  # fmt: skip
        signature = Signature.of(program)
        checks = _Checks(held_out, feeds) if held_out else _Checks(feeds)
        results: list[dict[str, torch.Tensor]] = []
        if choice.precision in _DTYPES:
            results = checks.run(program)
            del program  # before the library takes a copy of the weights: there may be no room for both
            gc.collect()
        enter(State.BUILDING)
        files, options = plan_file(onnx, order, directory)
        _give_back_memory()
        spec = listed_engine(signature, choice, files, options | notes)
        enter(State.VERIFYING)
        if choice.precision in _DTYPES:
            return replace(spec, error=_error_of_lowered(make(), spec, files, checks, results))
        return replace(spec, error=_error(program, spec, files, onnx, checks))


def _give_back_memory() -> None:
    """To the system, for the float32 reference that is loaded next: the C library keeps what TensorRT freed, gigabytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # no such call but in glibc
        ctypes.CDLL(None).malloc_trim(0)


def _quantized(onnx: OnnxFile, calibration: Calibration, component: str, scratch: Path) -> tuple[OnnxFile, dict[str, Any]]:
    """The int8 form of a graph, in a folder of its own, and what to note of it."""
    from mc_export.quantize import quantize_tensorrt

    path = scratch / "int8" / onnx.path.name
    path.parent.mkdir()
    notes: dict[str, Any] = quantize_tensorrt(onnx.path, path, calibration, component)
    return OnnxFile.at(path), notes


@dataclass(frozen=True)
class _Checks:
    """What a plan is measured on, and on what its results need only be finite."""

    measured: Sequence[Mapping[str, torch.Tensor]]
    finite: Sequence[Mapping[str, torch.Tensor]] = ()

    def run(self, program: Program) -> list[dict[str, torch.Tensor]]:
        """What the program gives for all that is measured. Raises EngineError where a result is not finite."""
        for feed in self.finite:
            check_finite(program.component, program.run(feed))
        return [program.run(feed) for feed in self.measured]


def _error(program: Program, spec: Engine, files: Sequence[Path], onnx: OnnxFile, checks: _Checks) -> MeasuredError:
    """The plan against its float32 module, or, where it cannot run here, the graph it was made of.

    One that was calibrated is measured on inputs of real requests; on random ones its results need only be finite.
    """
    if runs_here(program.component, spec, files):
        return verify_engine(program, spec, files, checks.measured, also_finite=checks.finite)
    graph = replace(spec, target="onnxruntime", files=tuple(file.name for file in onnx.files), options={})
    return replace(verify_engine(program, graph, onnx.files, checks.measured, also_finite=checks.finite), of="graph")


def _error_of_lowered(
    reference: Program, spec: Engine, files: Sequence[Path], checks: _Checks, results: Sequence[Mapping[str, torch.Tensor]]
) -> MeasuredError:
    """The same for a plan of 16 bits and less; where it cannot run here, `results` are what its program gave."""
    if runs_here(reference.component, spec, files):
        return verify_engine(reference, spec, files, checks.measured, also_finite=checks.finite)
    return replace(verify_results(reference, spec, checks.measured, results), of="graph")


def checked_extents(program: Program, profiles: Sequence[Profile]) -> Iterable[dict[str, int]]:
    """Sizes a plan is checked at: those that every program is checked at, brought into a profile each."""
    shapes = [program.example_extents, *program.check_extents()]
    found = []
    for index, extents in enumerate(shapes + shapes[:1] * (len(profiles) - len(shapes))):
        profile = profiles[index % len(profiles)]
        found.append({name: min(max(size, profile[name][0]), profile[name][2]) for name, size in extents.items()})
    return found
