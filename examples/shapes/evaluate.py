"""How often the demo draws what its captions ask for: on captions that training never saw, judged without any learned model.

python -m examples.shapes.evaluate --bundle shapes-bundle --count 200 --json result.json --sheet result.png
python -m examples.shapes.evaluate --checkpoint examples/shapes/checkpoint --no-canvas
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

from examples.shapes import data
from examples.shapes.judge import PROPERTIES, Verdict, judge, shares
from examples.shapes.source import Source, source_options

BATCH = 25
SHEET_COLUMNS = 6
SHEET_SCALE = 2
SHEET_LINE = 14
STEPS = 20
GUIDANCE = 4.5

Generate = Callable[..., Any]
"""`generate(prompts, seed=...)`, whose result has `images`: `mc_runtime.Runtime.generate` or the reference pipeline's."""


@dataclass(frozen=True)
class Trial:
    """One held-out caption, what was drawn for it, and the verdict."""

    scene: data.Scene
    picture: Image.Image
    verdict: Verdict


def evaluate(generate: Generate, count: int, seed: int) -> list[Trial]:
    """Draws `count` different held-out captions, the same ones for the same seed, and judges the pictures."""
    scenes = choose(count, random.Random(seed))
    trials = []
    for start in range(0, count, BATCH):
        batch = scenes[start : start + BATCH]
        pictures = generate([scene.caption for scene in batch], seed=seed + start).images
        trials += [Trial(scene, picture, judge(scene, picture)) for scene, picture in zip(batch, pictures, strict=True)]
    return trials


def choose(count: int, rng: random.Random) -> list[data.Scene]:
    """Different held-out scenes: up to a third of them without a relation, as many as there are.

    Raises:
        ValueError: fewer scenes are held out.
    """
    _, held_out = data.split()
    lone = [scene for scene in held_out if scene.relation is None]
    related = [scene for scene in held_out if scene.relation is not None]
    few = min(len(lone), count // 3)
    if count - few > len(related):
        raise ValueError(f"{len(held_out)} captions are held out, {count} were asked for")
    scenes = rng.sample(lone, few) + rng.sample(related, count - few)
    rng.shuffle(scenes)
    return scenes


def accuracy(trials: Sequence[Trial]) -> dict[str, float]:
    """The share of pictures that are right, by property."""
    return shares(trial.verdict for trial in trials)


def contact_sheet(trials: Sequence[Trial]) -> Image.Image:
    """All pictures with their captions; a wrong one has a red frame."""
    side = data.SIDE * SHEET_SCALE
    width, height = side + 56, side + 2 * SHEET_LINE + 8
    rows = -(-len(trials) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, trial in enumerate(trials):
        left, top = index % SHEET_COLUMNS * width + (width - side) // 2, index // SHEET_COLUMNS * height + 4
        sheet.paste(trial.picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        frame = "#d0d0d0" if trial.verdict.overall else "red"
        pen.rectangle((left - 1, top - 1, left + side, top + side), outline=frame)
        for line, text in enumerate(_wrap(trial.scene.caption)):
            pen.text((left + side // 2, top + side + 2 + line * SHEET_LINE), text, fill="black", anchor="ma")
    return sheet


def _wrap(caption: str, limit: int = 30) -> list[str]:
    """One line, or two of about the same length."""
    if len(caption) <= limit:
        return [caption]
    breaks = [i for i, letter in enumerate(caption) if letter == " "]
    middle = min(breaks, key=lambda i: abs(i - len(caption) // 2))
    return [caption[:middle], caption[middle + 1 :]]


def report(trials: Sequence[Trial], options: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds: options, accuracies, and every caption with its verdict."""
    verdicts = [{"caption": trial.scene.caption, **asdict(trial.verdict)} for trial in trials]
    return {**options, "accuracy": accuracy(trials), "trials": verdicts}


def print_table(trials: Sequence[Trial], title: str) -> None:
    """The accuracies as a table, below a line of `title`."""
    table = Table()
    table.add_column("property")
    table.add_column("right", justify="right")
    table.add_column("of", justify="right")
    right = accuracy(trials)
    for name in PROPERTIES:
        if name in right:
            asked = sum(getattr(trial.verdict, name) is not None for trial in trials)
            table.add_row(name, f"{100 * right[name]:.1f} %", str(asked), style="bold" if name == "overall" else None)
    console = Console()
    console.print(title)
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@source_options
@click.option("--count", type=click.IntRange(min=1), default=200, show_default=True, help="Held-out captions to draw.")
@click.option("--seed", default=0, show_default=True, help="Chooses captions and noise.")
@click.option("--steps", default=STEPS, show_default=True, help="Denoising steps.")
@click.option("--guidance", default=GUIDANCE, show_default=True, help="Weight of classifier-free guidance; 1 is none.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write accuracies and verdicts here.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet here (PNG).")
def main(
    source: Source,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    json_file: Path | None,
    sheet: Path | None,
) -> None:
    """Draws held-out captions and reports how many pictures show what was asked for."""
    try:
        choose(count, random.Random(seed))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--count") from error
    trials = evaluate(partial(source.generate, steps=steps, guidance_scale=guidance), count, seed)
    print_table(trials, f"{source}: {count} held-out captions, {steps} steps, guidance {guidance:g}")
    options = {**source.options, "count": count, "seed": seed, "steps": steps, "guidance": guidance}
    if json_file:
        json_file.write_text(json.dumps(report(trials, options), indent=2) + "\n", encoding="utf-8")
    if sheet:
        contact_sheet(trials).save(sheet)


if __name__ == "__main__":
    main()
