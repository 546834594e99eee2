"""What step caching saves and costs on a demo: the same held-out cases whole and by several thresholds, judged and timed.

    mc-runtime build demo -o bundle --target openvino --precision bf16 --cache
    python -m benchmarks.step_cache --demo shapes --bundle bundle

Every case is drawn by all contestants in turn, in an order shuffled anew, one at a time, planner and decoder included. A ratio
is the median over cases of the whole one's seconds to the cached one's.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import report
from mc_runtime import Runtime

WHOLE = "whole"
THRESHOLDS = (0.1, 0.2, 0.4)
MOST_LOST = 0.01
Evaluate = Callable[[Callable[..., Any], int], float]


def shapes(generate: Callable[..., Any], count: int) -> float:
    """The share of the image demo's pictures that are right."""
    from examples.shapes import evaluate

    return evaluate.accuracy(evaluate.evaluate(generate, count, 0))["overall"]


def edit(generate: Callable[..., Any], count: int) -> float:
    """The share of the editing demo's pictures that are right."""
    from examples.shapes.edit import evaluate

    return evaluate.shares(evaluate.evaluate(generate, count, 0, seen=False))["correct"]


def video(generate: Callable[..., Any], count: int) -> float:
    """The share of the video demo's films that are right, all four tasks in turn."""
    from examples.shapes.video import evaluate
    from examples.shapes.video.cases import TASKS, sample_cases

    cases = sample_cases(count, True, random.Random("evaluate 0"), TASKS)
    return evaluate.by_task(evaluate.evaluate(generate, cases, 0))["all"]["overall"]


DEMOS: dict[str, Evaluate] = {"shapes": shapes, "edit": edit, "video": video}


class Drawn:
    """All contestants' results, case by case."""

    def __init__(self, runtime: Runtime, contestants: dict[str, bool | float]) -> None:
        self._runtime = runtime
        self._contestants = contestants
        self._order = random.Random(0)
        self.results: dict[str, list[Any]] = {name: [] for name in contestants}

    def generate(self, prompt: str | Sequence[str], *, seed: int, **arguments: Any) -> Any:
        """Draws every prompt by everybody; gives what the last contestant drew, for whom an evaluation is run for show."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for index, text in enumerate(prompts):
            for name in self._order.sample(list(self._contestants), len(self._contestants)):
                self._runtime.forget_plans()
                made = self._runtime.generate(text, seed=seed + index, cache=self._contestants[name], **arguments)
                self.results[name].append(made)
        return self._joined(self.results[WHOLE][-len(prompts) :])

    def replay(self, name: str) -> Callable[..., Any]:
        """A `generate` that gives what a contestant drew, in the same order."""
        left = iter(self.results[name])

        def generate(prompt: str | Sequence[str], **_: Any) -> Any:
            return self._joined([next(left) for _ in range(1 if isinstance(prompt, str) else len(prompt))])

        return generate

    @staticmethod
    def _joined(results: Sequence[Any]) -> Any:
        return SimpleNamespace(
            images=[image for one in results for image in one.images], clips=[clip for one in results for clip in one.clips]
        )


def measure(demo: str, bundle: Path, count: int, threads: int, thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """The report of one demo, by these thresholds and the calibrated one."""
    runtime = Runtime.load(bundle, threads=threads)
    listed = runtime.manifest.step_cache
    if listed is None:
        raise SystemExit(f"{bundle}: build it with --cache")
    contestants: dict[str, bool | float] = {WHOLE: False}
    contestants |= {f"{one:g}": one for one in sorted({*thresholds, *([listed.threshold] if listed.threshold else [])})}
    evaluate, drawn, card = DEMOS[demo], Drawn(runtime, contestants), report.card()
    evaluate(drawn.generate, min(count, 2))  # compiles and warms up
    drawn.results = {name: [] for name in contestants}
    evaluate(drawn.generate, count)
    whole = drawn.results[WHOLE]
    rows = {}
    for name, results in drawn.results.items():
        steps = sum(one.computed_steps[0] for one in whole)
        rows[name] = {
            "accuracy": evaluate(drawn.replay(name), count),
            "computed": round(sum(one.computed_steps[0] for one in results) / steps, 4),
            "latents_relative_l2": float(np.mean([_off(one, other) for one, other in zip(results, whole, strict=True)])),
            "seconds": {stage: statistics.median(one.timings[stage] for one in results) for stage in ("denoise", "total")},
            "ratio": {stage: _ratio(whole, results, stage) for stage in ("denoise", "total")},
        }
    calibrated = f"{listed.threshold:g}" if listed.threshold else None
    within = {name: row for name, row in rows.items() if row["accuracy"] >= rows[WHOLE]["accuracy"] - MOST_LOST - 1e-9}
    best = max(within, key=lambda name: within[name]["ratio"]["denoise"])
    step = runtime.manifest.engines["step"]
    return {
        "benchmark": "step_cache",
        **card,
        "demo": demo,
        "engine": f"{step.target} {step.precision}",
        "backbone": runtime.manifest.backbone,
        "steps": runtime.manifest.steps.default,
        "cases": count,
        "threads": threads,
        "calibrated": calibrated,
        "best_within_one_point": best,
        "contestants": rows,
    }


def _off(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one.latents - other.latents) / np.linalg.norm(other.latents))


def _ratio(whole: Sequence[Any], kept: Sequence[Any], stage: str) -> float:
    pairs = zip(whole, kept, strict=True)
    return round(statistics.median(one.timings[stage] / other.timings[stage] for one, other in pairs), 3)


def print_report(found: dict[str, Any]) -> None:
    """A row a contestant."""
    table = Table(title=f"{found['demo']}, {found['engine']}, {found['steps']} steps, {found['cases']} cases")
    for title in ("threshold", "right", "computed", "latents L2", "denoise x", "request x"):
        table.add_column(title, justify="right")
    for name, row in found["contestants"].items():
        mark = " *" if name == found["calibrated"] else ""
        table.add_row(
            name + mark, f"{100 * row['accuracy']:.1f} %", f"{100 * row['computed']:.0f} %",
            f"{row['latents_relative_l2']:.3f}", f"{row['ratio']['denoise']:.2f}", f"{row['ratio']['total']:.2f}",
        )  # fmt: skip
    report.console.print(table)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", choices=list(DEMOS), default="shapes")
    parser.add_argument("--bundle", type=Path, required=True, help="of that demo, built with --cache")
    parser.add_argument("--count", type=int, default=300, help="held-out cases")
    parser.add_argument("--threshold", type=float, action="append", help="beside the calibrated one; may be given again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    thresholds = arguments.threshold or THRESHOLDS
    found = measure(arguments.demo, arguments.bundle, arguments.count, arguments.threads, thresholds)
    print_report(found)
    report.save(f"step-cache-{arguments.demo}", found, arguments.results)
    return found


if __name__ == "__main__":
    main()
