"""What the canvas costs: one denoising step with it against the same step without, interleaved in one run.

    python -m benchmarks.canvas_cost --size mid-wan

The step without is that of the same backbone weights as a stock checkpoint would have it. Its int8 engine is quantized anew.
Inputs are random, of the shapes of the backbone's request in `benchmarks.end_to_end`.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import mid, models, report, tiny
from benchmarks.bundles import VARIANTS, variant_folder
from benchmarks.checkpoints import metacanvas_checkpoint, subject_checkpoint, work_folder
from mc_export.build.engine import engine_of_notes, make_engine
from mc_export.build.options import EngineChoice
from mc_export.build.parts import Part
from mc_export.build.plan import PlanWishes
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint
from mc_export.lower import Calibration
from mc_export.program.step import StepProgram
from mc_export.sampler import build_sampler_table
from mc_runtime.backends.base import Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.bench import time_rounds
from mc_runtime.bundle.manifest import Engine
from mc_runtime.bundle.store import open_bundle

SIZES = ("mid-deep", *(f"{size}{name}" for size in ("mid", "tiny") for name in ("", *(f"-{name}" for name in mid.SUBJECTS))))
EAGER = "torch eager fp32"
#: Of the step without it, wanted of every target on *mid*.
MOST_COST = 0.05
WITH, WITHOUT = "with", "without"
_CONTEXT_ROWS = 64
_STEPS = 8  # enough for a solver of any order to reach it, as in the bundle's step


class StepEngine:
    """One bound step engine."""

    def __init__(
        self, name: str, engine: Engine, files: Sequence[Path], feed: Mapping[str, torch.Tensor], threads: int
    ) -> None:
        self.name = name
        backend = create_backend(engine.target, Settings(threads))
        loaded = backend.load("step", tuple(files), engine)
        inputs = {spec.name: backend.to_device(feed[spec.name].numpy()) for spec in engine.inputs}
        shapes = {"next_sample": feed["sample"].shape} | ({"next_history": feed["history"].shape} if "history" in feed else {})
        self._call = loaded.bind(inputs, {name: backend.empty(tuple(shape)) for name, shape in shapes.items()})

    def draw(self) -> dict[str, float]:
        """One step."""
        self._call.run()
        return {}


class StepModule:
    """The step's program run by torch."""

    def __init__(self, name: str, program: StepProgram, feed: Mapping[str, torch.Tensor]) -> None:
        self.name = name
        self._program = program
        self._feed = {spec.name: feed[spec.name] for spec in program.inputs}

    def draw(self) -> dict[str, float]:
        """One step."""
        self._program.run(self._feed)
        return {}


def measure(size: str, variants: Sequence[str], rounds: int, threads: int, work: Path) -> dict[str, Any]:
    """Build what is not there, time; the report."""
    torch.set_num_threads(threads)
    folder, subject = checkpoint_of(size, work)
    checkpoint = load_checkpoint(folder)
    programs = {kind: step_program(checkpoint, canvas=kind == WITH) for kind in (WITH, WITHOUT)}
    extents = request_extents(checkpoint, subject, programs[WITH])
    feed = programs[WITH].example(extents)
    contestants: list[Any] = [StepModule(f"{EAGER} {kind}", program, feed) for kind, program in programs.items()]
    for name in variants:
        for kind in (WITH, WITHOUT):
            engine, files = step_engine(name, folder, checkpoint, work, canvas=kind == WITH)
            contestants.append(StepEngine(f"{name} {kind}", engine, files, feed, threads))
    for contestant in contestants:
        contestant.draw()
    card = report.card()
    times = time_rounds(contestants, rounds, None)
    result = {
        "benchmark": "canvas_cost",
        "checkpoint": size,
        **card,
        "load_after": os.getloadavg()[0],
        "extents": extents,
        "rounds": rounds,
        "threads": threads,
        "targets": {name: cost_of(times, name) for name in (EAGER, *variants)},
    }
    most = MOST_COST if size.startswith("mid") else float("inf")
    targets: Mapping[str, Any] = result["targets"]
    result["bars"] = [
        report.bar(f"{size}, {name}: the canvas, of a step", entry["cost"], at_most=most) for name, entry in targets.items()
    ]
    return result


def cost_of(times: Mapping[str, Sequence[Mapping[str, float]]], name: str) -> dict[str, Any]:
    """Medians in seconds, and the median over rounds of what the canvas adds, as a share of the step without."""
    own, stock = ([each["total"] for each in times[f"{name} {kind}"]] for kind in (WITH, WITHOUT))
    costs = [with_canvas / without - 1 for with_canvas, without in zip(own, stock, strict=True)]
    return {
        "seconds_with": statistics.median(own),
        "seconds_without": statistics.median(stock),
        "cost": statistics.median(costs),
        "cost_range": [min(costs), max(costs)],
    }


def checkpoint_of(size: str, work: Path) -> tuple[Path, mid.Subject | None]:
    """The checkpoint of a size, and its subject where it is not SANA's."""
    if size in models.SIZES:
        return metacanvas_checkpoint(models.SIZES[size], work), None
    kind, _, name = size.partition("-")
    subject = mid.SUBJECTS.get(name)
    if kind == "tiny" or subject is None:
        return tiny.checkpoint(name or "sana", work), subject
    return subject_checkpoint(subject, work), subject


def step_program(checkpoint: Checkpoint, *, canvas: bool) -> StepProgram:
    """The step of requests for one result; without the canvas as a stock checkpoint's."""
    scheduler: Any = checkpoint.load_scheduler()
    arguments: dict[str, Any] = {"token_counts": [256]} if scheduler.config.get("use_dynamic_shifting") else {}
    table = build_sampler_table(
        scheduler, max_steps=_STEPS, step_counts=[_STEPS], set_timesteps=checkpoint.backbone.set_timesteps(scheduler),
        timestep_scale=checkpoint.backbone.timestep_scale(checkpoint.model_config), **arguments,
    )  # fmt: skip
    assert checkpoint.config is not None
    backbone = checkpoint.load_backbone(checkpoint.load_canvas() if canvas else None)
    width = checkpoint.backbone.prepared_context_width(checkpoint.model_config)
    keyframes = checkpoint.config.canvas.grid[0]
    program = StepProgram(backbone, width, order=table.order, keyframes=keyframes)
    program.eval()
    return program


def request_extents(checkpoint: Checkpoint, subject: mid.Subject | None, program: StepProgram) -> dict[str, int]:
    """Of the program's dimensions in the request that is timed end to end."""
    height, width = checkpoint.default_size if subject is None or "tiny" in checkpoint.path.name else subject.size
    cell = checkpoint.pixels_per_latent
    assert checkpoint.config is not None
    _, rows, columns = checkpoint.config.canvas.grid_at(height, width)
    adapter = checkpoint.backbone
    branches = 2 if adapter.weighs_branches(checkpoint.defaults.guidance_scale) else 1
    asked = {"B": 1, "G": branches, "H": height // cell, "W": width // cell, "L": _CONTEXT_ROWS, "h": rows, "w": columns}
    asked |= {"RH": height // cell, "RW": width // cell, "R": 1}
    if subject is not None and subject.frames is not None:
        asked["T"] = checkpoint.strides.latent_frames(subject.frames)
    return {name: asked[name] for name in program.axes}


def step_engine(name: str, folder: Path, checkpoint: Checkpoint, work: Path, *, canvas: bool) -> tuple[Engine, list[Path]]:
    """The step engine with or without a canvas: the bundle's where there is one, else made by itself and kept."""
    bundle = variant_folder(name, folder, work)
    if canvas and bundle.is_dir():
        spec = open_bundle(bundle).manifest.engines["step"]
        return spec, [bundle / file for file in spec.files]
    target, precision, engines = VARIANTS[name]
    choice = engines.get("step", EngineChoice(target, precision))
    kept = work / ("steps" if canvas else "stock-steps") / f"{folder.name}-{name.replace(' ', '-')}"
    notes = kept / "engine.json"
    if not notes.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        made = make_engine(
            Part("step", (), lambda: step_program(checkpoint, canvas=canvas)), choice, kept,
            lambda state: report.console.print(f"{name} {WITH if canvas else WITHOUT}: {state}", style="dim"),
            lambda component: _calibration(checkpoint, component, canvas), "", PlanWishes({}),
        )  # fmt: skip
        notes.write_text(report.as_json(made))
    spec = engine_of_notes(report.from_json(notes), str(kept))
    return spec, [Path(file) for file in spec.files]


def _calibration(checkpoint: Checkpoint, component: str, canvas: bool) -> Calibration:
    from mc_export.quantize.calibration import calibration_inputs

    feeds = calibration_inputs(checkpoint, component)
    return feeds if canvas else [{name: rows for name, rows in feed.items() if name != "canvas"} for feed in feeds]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", default="openvino bf16,openvino int8", help=f"comma-separated: {', '.join(VARIANTS)}")
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    parser.add_argument("--quick", action="store_true", help="one round of one bundle; proves that it runs")
    arguments = parser.parse_args(argv)
    variants = ("openvino bf16",) if arguments.quick else tuple(filter(None, arguments.variants.split(",")))
    rounds = 1 if arguments.quick else arguments.rounds
    result = measure(arguments.size, variants, rounds, arguments.threads, work_folder(arguments.work))
    report.print_bars(result["bars"])
    report.save(f"canvas-{arguments.size}{'-quick' if arguments.quick else ''}", result, arguments.results)
    return result


if __name__ == "__main__":
    main()
