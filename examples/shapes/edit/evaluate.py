"""How often the editing demo does what it is told, and nothing else: instructions that training never saw, on new pictures.

python -m examples.shapes.edit.evaluate --bundle edit-bundle --count 300 --json result.json --sheet result.png
python -m examples.shapes.edit.evaluate --checkpoint examples/shapes/edit/checkpoint --no-canvas
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
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from examples.shapes.data import SIDE
from examples.shapes.edit import data
from examples.shapes.edit.judge import Verdict, judge
from examples.shapes.edit.models import STEPS
from examples.shapes.source import Source, source_options

GUIDANCE = 3.5
SHEET_COLUMNS = 4
SHEET_SCALE = 2

Generate = Callable[..., Any]
"""`generate(prompt, image=..., seed=...)`, whose result has `images`: `mc_runtime.Runtime.generate` or the reference's."""


@dataclass(frozen=True)
class Trial:
    """One picture and its instruction, what came out, and the verdict."""

    edit: data.Edit
    before: Image.Image
    after: Image.Image
    verdict: Verdict


def evaluate(generate: Generate, count: int, seed: int, seen: bool = False) -> list[Trial]:
    """Edits `count` new pictures by held-out instructions, the same ones for the same seed, and judges the results.

    With `seen` the instructions are those of training; the pictures are new all the same.
    """
    trials = []
    instructions = data.split()[0 if seen else 1]
    for index, edit in enumerate(data.sample(instructions, count, random.Random(f"evaluation {seed}"))):
        before = edit.pictures()[0]
        after = generate(edit.instruction.text, image=before, seed=seed + index).images[0]
        trials.append(Trial(edit, before, after, judge(edit, after)))
    return trials


def shares(trials: Sequence[Trial]) -> dict[str, float]:
    """The share of pictures that are right: by property, all together, and by operation; and the mean drift, of 255."""

    def share(rights: list[bool]) -> float:
        return sum(rights) / len(rights)

    found = {name: share([getattr(t.verdict, name) for t in trials]) for name in ("done", "kept", "nothing_else", "correct")}
    for operation in data.OPERATIONS:
        of_it = [trial.verdict.correct for trial in trials if trial.edit.instruction.operation == operation]
        if of_it:
            found[operation] = share(of_it)
    return {**found, "drift": sum(trial.verdict.drift for trial in trials) / len(trials)}


def contact_sheet(trials: Sequence[Trial]) -> Image.Image:
    """Every picture before and after, with the instruction; a wrong one has a red frame."""
    side, gap = SIDE * SHEET_SCALE, 6
    width, height = 2 * side + gap + 24, side + 24
    rows = -(-len(trials) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        left, top = index % SHEET_COLUMNS * width + 12, index // SHEET_COLUMNS * height + 4
        frame = "#d0d0d0" if trial.verdict.correct else "red"
        for picture, start in ((trial.before, left), (trial.after, left + side + gap)):
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (start, top))
            pen.rectangle((start - 1, top - 1, start + side, top + side), outline=frame)
        pen.text((left + side + gap // 2, top + side + 2), trial.edit.instruction.text, fill="black", anchor="ma")
    return sheet


def report(trials: Sequence[Trial], options: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds: options, shares, and every instruction with its verdict."""
    verdicts = [
        {"instruction": trial.edit.instruction.text, **asdict(trial.verdict), "correct": trial.verdict.correct}
        for trial in trials
    ]
    return {**options, "shares": shares(trials), "trials": verdicts}


def print_table(trials: Sequence[Trial], title: str) -> None:
    """The shares as a table, below a line of `title`."""
    table = Table()
    table.add_column("property")
    table.add_column("right", justify="right")
    for name, share in shares(trials).items():
        text = f"{share:.2f} of 255" if name == "drift" else f"{100 * share:.1f} %"
        table.add_row(name.replace("_", " "), text, style="bold" if name == "correct" else None)
    console = Console()
    console.print(title)
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@source_options
@click.option("--seen", is_flag=True, help="Take the instructions of training, on new pictures.")
@click.option("--count", type=click.IntRange(min=1), default=300, show_default=True, help="Pictures to edit.")
@click.option("--seed", default=0, show_default=True, help="Chooses pictures, instructions and noise.")
@click.option("--steps", default=STEPS, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=GUIDANCE, show_default=True, help="The scale that the model is told.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write shares and verdicts here.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet here (PNG).")
def main(
    source: Source,
    seen: bool,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    json_file: Path | None,
    sheet: Path | None,
) -> None:
    """Edits pictures by instructions and reports how many came out as asked, with everything else as it was."""
    trials = evaluate(partial(source.generate, steps=steps, guidance_scale=guidance), count, seed, seen)
    which = "training's" if seen else "held-out"
    print_table(trials, f"{source}: {count} {which} instructions, {steps} steps, guidance {guidance:g}")
    options = {**source.options, "seen": seen, "count": count, "seed": seed, "steps": steps, "guidance": guidance}
    if json_file:
        json_file.write_text(json.dumps(report(trials, options), indent=2) + "\n", encoding="utf-8")
    if sheet:
        contact_sheet(trials).save(sheet)


if __name__ == "__main__":
    main()
