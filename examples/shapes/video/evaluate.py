"""How often the video demo films what it is told: on instructions that training never saw, judged without any learned model.

python -m examples.shapes.video.evaluate --bundle video-bundle --count 200 --json result.json --sheet result.png
python -m examples.shapes.video.evaluate --checkpoint examples/shapes/video/checkpoint --no-canvas
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from examples.shapes.data import SIDE
from examples.shapes.source import Source, source_options
from examples.shapes.video.cases import TASKS, Case, sample_cases
from examples.shapes.video.judge import PROPERTIES, Verdict, judge, shares
from examples.shapes.video.models import STEPS
from examples.shapes.video.world import FPS
from mc_runtime.media.clip import Clip
from mc_runtime.media.clip_output import save_clip

SHOWN = (0, 2, 4, 6, 8)
"""The frames of a film that a contact sheet shows."""
LINE, GAP = 14, 4
SHEET_COLUMNS = 2

Generate = Callable[..., Any]
"""`generate(prompt, task=..., seed=..., image=..., video=...)`, whose result has `clips`: the runtime's or the reference's."""


@dataclass(frozen=True)
class Trial:
    """One held-out case, the film that was made, u8 `[FRAMES, 64, 64, 3]`, and the verdict."""

    case: Case
    frames: NDArray[np.uint8]
    verdict: Verdict


def evaluate(generate: Generate, cases: Sequence[Case], seed: int) -> list[Trial]:
    """Films every case and judges it."""
    trials = []
    for index, case in enumerate(cases):
        media: dict[str, Any] = {} if case.picture is None else {"image": case.picture}
        if case.clip is not None:
            media = {"video": Clip(case.clip, FPS)}
        made = generate(case.prompt, task=case.task, seed=seed + index, **media).clips[0]
        frames = made.frames if isinstance(made, Clip) else np.rint(made * 255).astype(np.uint8)
        trials.append(Trial(case, frames, judge(case, frames)))
    return trials


def by_task(trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """The share of films that are right, by task, and of all, and by property."""
    tasks = {task: [trial.verdict for trial in trials if trial.case.task == task] for task in TASKS}
    return {task: shares(verdicts) for task, verdicts in {**tasks, "all": [t.verdict for t in trials]}.items() if verdicts}


def contact_sheet(trials: Sequence[Trial]) -> Image.Image:
    """Films with their instructions, a few frames of each side by side, behind what they were given; a wrong one has a red
    frame."""
    width, height = (len(SHOWN) + 1) * (SIDE + GAP) + 5 * GAP, SIDE + LINE + 2 * GAP
    rows = -(-len(trials) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width + GAP, rows * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        left, top = GAP + index % SHEET_COLUMNS * width, GAP + index // SHEET_COLUMNS * height
        pen.text((left, top), f"{trial.case.task}: {trial.case.prompt}", fill="black")
        top += LINE
        given = trial.case.picture if trial.case.clip is None else Image.fromarray(trial.case.clip[0])
        if given is not None:
            sheet.paste(given, (left, top))
        left += SIDE + 3 * GAP
        edge = "#d0d0d0" if trial.verdict.overall else "red"
        pen.rectangle((left - 2, top - 2, left + len(SHOWN) * (SIDE + GAP) - GAP + 1, top + SIDE + 1), outline=edge)
        for place, frame in enumerate(SHOWN):
            sheet.paste(Image.fromarray(trial.frames[frame]), (left + place * (SIDE + GAP), top))
    return sheet


def animation(trials: Sequence[Trial], columns: int = 6, scale: int = 2) -> Clip:
    """The films side by side, moving; each rests on its last frame for a while."""
    side = SIDE * scale + 2 * GAP
    rows = -(-len(trials) // columns)
    frames = []
    for number in range(len(trials[0].frames)):
        sheet = Image.new("RGB", (columns * side, rows * side), "white")
        for index, trial in enumerate(trials):
            picture = Image.fromarray(trial.frames[number]).resize((SIDE * scale,) * 2, Image.Resampling.LANCZOS)
            sheet.paste(picture, (index % columns * side + GAP, index // columns * side + GAP))
        frames.append(sheet)
    return Clip.of_images(frames + frames[-1:] * 4, FPS)


def print_table(trials: Sequence[Trial], title: str) -> None:
    """The accuracies as a table, below a line of `title`."""
    table = Table()
    table.add_column("task")
    table.add_column("films", justify="right")
    for name in PROPERTIES:
        table.add_column(name, justify="right", style="bold" if name == "overall" else None)
    for task, right in by_task(trials).items():
        count = sum(task in ("all", trial.case.task) for trial in trials)
        cells = [f"{100 * right[name]:.1f} %" if name in right else "" for name in PROPERTIES]
        table.add_row(task, str(count), *cells)
    console = Console()
    console.print(title)
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@source_options
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True, help="Held-out instructions.")
@click.option("--task", "tasks", type=click.Choice(TASKS), multiple=True, help="Only this task; may be given again.")
@click.option("--seed", default=0, show_default=True, help="Chooses instructions and noise.")
@click.option("--steps", default=STEPS, show_default=True, help="Denoising steps.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write accuracies and verdicts here.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet of the first 24 here (PNG).")
@click.option("--moving", type=click.Path(path_type=Path), help="Write the first 24 as one animation here (GIF, WebP).")
def main(
    source: Source,
    count: int,
    tasks: tuple[str, ...],
    seed: int,
    steps: int,
    json_file: Path | None,
    sheet: Path | None,
    moving: Path | None,
) -> None:
    """Films held-out instructions of all four tasks and reports how many films show what was asked for."""
    cases = sample_cases(count, True, random.Random(f"evaluate {seed}"), tasks or TASKS)
    trials = evaluate(partial(source.generate, steps=steps), cases, seed)
    print_table(trials, f"{source}: {count} held-out instructions, {steps} steps")
    if json_file:
        verdicts = [{"task": t.case.task, "prompt": t.case.prompt, **asdict(t.verdict)} for t in trials]
        options = {**source.options, "count": count, "seed": seed, "steps": steps}
        report = {**options, "accuracy": by_task(trials), "trials": verdicts}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if sheet:
        contact_sheet(trials[:24]).save(sheet)
    if moving:
        save_clip(animation(trials[:24]), moving)


if __name__ == "__main__":
    main()
