"""From the start of a process to the picture's file: `mc-runtime generate` against a torch script that draws the same picture.

    python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import process, report

PROMPT = "a red circle left of a blue square"
MOST_SHARE = 0.25


def measure(bundle: str, checkpoint: Path, rounds: int) -> dict[str, Any]:
    """Both draw once to warm the disk cache and their compiled modules, their pictures are compared, then rounds are timed."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.png", Path(folder) / "theirs.png"
        commands = {
            "mc-runtime generate": process.mc_runtime("generate", bundle, PROMPT, "-o", ours, "--seed", "0"),
            "torch reference": [sys.executable, "-m", "benchmarks.torch_reference", str(checkpoint), PROMPT, str(theirs)],
        }
        for command in commands.values():
            process.run(command)
        pixels = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) for file in (ours, theirs)]
        card = report.card()
        order = random.Random(0)
        runs: dict[str, list[process.Ran]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name in order.sample(list(commands), len(commands)):
                runs[name].append(process.run(commands[name]))
    seconds = {name: statistics.median(run.seconds for run in each) for name, each in runs.items()}
    share = statistics.median(
        own.seconds / other.seconds
        for own, other in zip(runs["mc-runtime generate"], runs["torch reference"], strict=True)
    )
    return {
        "benchmark": "startup",
        **card,
        "prompt": PROMPT,
        "rounds": rounds,
        "picture_mean_error": float(np.abs(pixels[0] - pixels[1]).mean()),
        "contestants": {
            name: {
                "seconds": {
                    "median": seconds[name],
                    "min": min(run.seconds for run in each),
                    "max": max(run.seconds for run in each),
                },
                "peak_bytes": int(statistics.median(run.peak_bytes for run in each)),
            }
            for name, each in runs.items()
        },
        "bars": [report.bar("mc-runtime generate demo, share of the torch reference's time", share, at_most=MOST_SHARE)],
    }


def print_result(result: dict[str, Any]) -> None:
    """A line a contestant, and the bar."""
    where, rounds = result["machine_text"], result["rounds"]
    report.console.print(f"\n[bold]process start to file[/bold] on {where}, median of {rounds} rounds")
    for name, entry in result["contestants"].items():
        seconds = entry["seconds"]
        report.console.print(
            f"{name:<22}{seconds['median']:8.2f} s  ({seconds['min']:.2f}-{seconds['max']:.2f})"
            f"{entry['peak_bytes'] / 2**20:10.0f} MiB at most"
        )
    report.console.print(f"mean difference of the pictures: {result['picture_mean_error']:.3f} of 255")
    report.print_bars(result["bars"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo", help="what `mc-runtime generate` is given")
    parser.add_argument("--checkpoint", type=Path, default=report.ROOT / "examples" / "shapes" / "checkpoint")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    result = measure(arguments.bundle, arguments.checkpoint, arguments.rounds)
    print_result(result)
    report.save("startup", result, arguments.results)
    return result


if __name__ == "__main__":
    main()
