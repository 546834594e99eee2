"""What FP8 and INT4 do to the demos' latents, pictures and accuracy. Emulated on the CPU: its time says nothing.

    python -m benchmarks.fp8_quality
    python -m benchmarks.fp8_quality --demo edit --count 100 --way int4

Planner and step run as torch programs in five ways: float32, bfloat16, and, with the layers kept that `mc-runtime calibrate`
keeps and the rest in bfloat16, FP8 with a scale for each row (inductor-cuda) and for each tensor (TensorRT), and weights of 4
bits (TensorRT). All other engines are float32 onnxruntime's. Every way draws the same held-out captions from the same noise;
ways that are named join what was recorded of them. Writes benchmarks/results/fp8.json and the table of docs/fp8.md.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.programs import ProgramBackend, ProgramEngine
from examples.shapes import evaluate as shapes
from examples.shapes.edit import evaluate as edits
from examples.shapes.video import evaluate as films
from examples.shapes.video.cases import TASKS, sample_cases
from mc_export.build import BuildOptions, build_bundle
from mc_export.build.calibrate import CalibrationOptions, calibrate, program_of
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.program.base import Program
from mc_export.quantize.calibration import calibration_inputs
from mc_export.quantize.fp8.apply import apply_fp8
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.record import CalibrationRecord
from mc_runtime import Runtime
from mc_runtime.backends.base import Settings, Shapes
from mc_runtime.bundle.store import Bundle, open_bundle
from mc_runtime.runtime.engines import Engines, LoadedEngine

RESULT = "fp8"
PAGE = report.ROOT / "docs" / "fp8.md"
HEAD = ("demo", "captions", "planner and step", "latents", "pictures, of 255", "worst picture", "right")
_TABLE = re.compile(r"(<!-- quality -->\n).*?(<!-- /quality -->)", re.DOTALL)
_OVERALL = ("overall", "correct")
COMPONENTS = ("planner", "step")
_LAYERED = {"fp8 rows": Activations.ROWS, "fp8 tensor": Activations.TENSOR, "int4": Activations.BLOCKS}
WAYS = ("fp32", "bf16", *_LAYERED)


@dataclass(frozen=True)
class Demo:
    """A shipped checkpoint and its judge: `accuracy(generate, count, seed)` gives shares that are right."""

    folder: str
    steps: int
    guidance: float | None
    accuracy: Callable[[Callable[..., Any], int, int], Mapping[str, float]]


def _films(generate: Callable[..., Any], count: int, seed: int) -> Mapping[str, float]:
    cases = sample_cases(count, True, random.Random(f"evaluate {seed}"), TASKS)
    found: Mapping[str, float] = films.by_task(films.evaluate(generate, cases, seed))["all"]
    return found


DEMOS = {
    "image": Demo(
        "examples/shapes/checkpoint", shapes.STEPS, shapes.GUIDANCE,
        lambda generate, count, seed: shapes.accuracy(shapes.evaluate(generate, count, seed)),
    ),
    "edit": Demo(
        "examples/shapes/edit/checkpoint", edits.STEPS, edits.GUIDANCE,
        lambda generate, count, seed: edits.shares(edits.evaluate(generate, count, seed)),
    ),
    "video": Demo("examples/shapes/video/checkpoint", films.STEPS, None, _films),
}  # fmt: skip


class MixedEngines(Engines):
    """A bundle's engines, but for those that programs stand in for."""

    def __init__(self, bundle: Bundle, programs: Mapping[str, Program]) -> None:
        super().__init__(bundle, Settings())
        self._programs = programs

    def _load(self, component: str, shapes: Shapes | None) -> LoadedEngine:
        if component not in self._programs:
            return super()._load(component, shapes)
        spec, backend = self._bundle.manifest.engines[component], ProgramBackend(Settings())
        return LoadedEngine(spec, backend, ProgramEngine(self._programs[component]))


def programs(checkpoint: Checkpoint, way: str, record: CalibrationRecord) -> dict[str, Program]:
    """Planner and step in one of `WAYS`."""
    found = {}
    for component in COMPONENTS:
        program = program_of(checkpoint, component, calibration_inputs(checkpoint, component)).eval()
        if way in _LAYERED:
            apply_fp8(program, record.of(component, _LAYERED[way], checkpoint.sha256))
        found[component] = program if way == "fp32" else compute_in_bf16(program)
    return found


@dataclass
class Drawn:
    """What one way drew."""

    latents: list[np.ndarray]
    pixels: list[np.ndarray]
    accuracy: dict[str, float]


def draw(demo: Demo, bundle: Bundle, made: Mapping[str, Program], count: int, seed: int) -> Drawn:
    """All captions by these programs; the latents and pictures are kept."""
    runtime = Runtime(bundle, MixedEngines(bundle, made))
    drawn = Drawn([], [], {})

    def generate(*arguments: Any, **keywords: Any) -> Any:
        result = runtime.generate(*arguments, **keywords)
        drawn.latents.append(result.latents)
        pixels = [np.asarray(image) for image in result.images] or [clip.frames for clip in result.clips]
        drawn.pixels += [each.astype(np.float32) for each in pixels]
        return result

    asked: dict[str, Any] = {"steps": demo.steps} | ({} if demo.guidance is None else {"guidance_scale": demo.guidance})
    drawn.accuracy = dict(demo.accuracy(partial(generate, **asked), count, seed))
    return drawn


def compared(drawn: Drawn, truth: Drawn) -> dict[str, Any]:
    """The difference of one way's latents (relative L2) and pictures (levels of 255) from float32's, and its accuracy."""
    latents, expected = (np.concatenate([each.ravel() for each in one.latents]) for one in (drawn, truth))
    levels = [float(np.abs(one - other).mean()) for one, other in zip(drawn.pixels, truth.pixels, strict=True)]
    return {
        "latents": float(np.linalg.norm(latents - expected) / np.linalg.norm(expected)),
        "levels_mean": float(np.mean(levels)), "levels_worst_picture": float(np.max(levels)), "accuracy": drawn.accuracy,
    }  # fmt: skip


def measure(name: str, ways: Sequence[str], count: int, seed: int, folder: Path) -> dict[str, Any]:
    """One demo in these ways and in float32."""
    demo = DEMOS[name]
    checkpoint = load_checkpoint(report.ROOT / demo.folder)
    layered = tuple(activations for way, activations in _LAYERED.items() if way in ways)
    record = calibrate(checkpoint, CalibrationOptions(components=COMPONENTS, activations=layered))
    build_bundle(checkpoint.path, folder / name, BuildOptions())
    bundle = open_bundle(folder / name)
    found: dict[str, Any] = {**report.card(), "count": count, "seed": seed, "steps": demo.steps, "guidance": demo.guidance}
    found["checkpoint"] = checkpoint.sha256
    found["engines"] = []
    for one in record.measured:
        found["engines"].append({"component": one.component, "sites": len(one.sites), **next(iter(one.notes().values()))})
    truth: Drawn | None = None
    found["ways"] = {}
    for way in dict.fromkeys(["fp32", *ways]):
        drawn = draw(demo, bundle, programs(checkpoint, way, record), count, seed)
        truth = truth or drawn
        found["ways"][way] = compared(drawn, truth)
        report.console.print(f"{name} {way}: {found['ways'][way]}", markup=False)
    return found


def joined(new: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """New results with those recorded of the same checkpoint, captions and noise; of float32 the recorded ones."""
    same = ("count", "seed", "steps", "guidance", "checkpoint")
    if before is None or any(before.get(key) != new[key] for key in same):
        return new
    kept = {way: found for way, found in before["ways"].items() if way == "fp32" or way not in new["ways"]}
    measured = {(one["component"], one["activations"]) for one in new["engines"]}
    engines = [one for one in before["engines"] if (one["component"], one["activations"]) not in measured]
    return {**new, "ways": {way: {**new["ways"], **kept}[way] for way in WAYS if way in {**new["ways"], **kept}},
            "engines": [*engines, *new["engines"]]}  # fmt: skip


def table(demos: Mapping[str, Mapping[str, Any]]) -> str:
    """The recorded results as Markdown."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    for name, demo in demos.items():
        for way, found in demo["ways"].items():
            right = next(found["accuracy"][key] for key in _OVERALL if key in found["accuracy"])
            levels = (f"{found['levels_mean']:.2f}", f"{found['levels_worst_picture']:.2f}")
            lines.append((name, str(demo["count"]), way, f"{found['latents']:.3f}", *levels, f"{100 * right:.1f} %"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page_with(demos: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/fp8.md with the table of these results."""
    text, count = _TABLE.subn(lambda found: found[1] + table(demos) + found[2], PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{PAGE}: has {count} places for the table")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="append", choices=list(DEMOS), help="only this one; image if none is named")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this one; all if none is named")
    parser.add_argument("--count", type=int, default=200, help="held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="chooses captions and noise")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    file = (arguments.results or report.RESULTS) / f"{RESULT}.json"
    before = report.from_json(file)["demos"] if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.demo or ["image"]:
            new = measure(name, arguments.way or WAYS, arguments.count, arguments.seed, Path(folder))
            before[name] = joined(new, before.get(name))
    demos = before
    document = {"benchmark": RESULT, "arithmetic": "emulated on the CPU", "demos": demos}
    report.save(RESULT, document, arguments.results)
    if arguments.results is None:
        PAGE.write_text(page_with(demos), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
