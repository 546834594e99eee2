"""docs/speed.md: every backbone end to end, the best bundle of each and what the canvas costs, from the results that are there.

python -m benchmarks.page > docs/speed.md
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import mid, report
from benchmarks.canvas_cost import MOST_COST
from benchmarks.end_to_end import EAGER, LEAST_BEST_OPENVINO, PICTURE_GATE, best_bundle

COMPILED = "torch compile fp32"
#: Contestants in the order of the columns; what was left out of a run is a dash.
COLUMNS = (
    "torch eager bf16", COMPILED, "onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino bf16", "openvino int8",
    "openvino int8 step",
)  # fmt: skip
MISSING = "-"
SIZES = {"sana": "mid"} | {name: f"mid-{name}" for name in mid.SUBJECTS}
#: What the canvas costs depends on the backbone's depth: SANA's is timed as deep as published, too.
COSTS = {"sana": "mid-deep", "sana, 8 blocks": "mid"} | {name: f"mid-{name}" for name in mid.SUBJECTS}
LEAST = {"sana": LEAST_BEST_OPENVINO} | {name: subject.least_ratio for name, subject in mid.SUBJECTS.items()}
_HEAD = """# Speed of every backbone

Written by `python -m benchmarks.page > docs/speed.md` from `benchmarks/results/`; a test compares. What is timed, and why a
bar is missed where one is: [benchmarks.md](benchmarks.md). Random weights at *mid* size, whole requests, prompt to pixels.
"""
_END_TO_END = f"""
## End to end
Seconds of {EAGER}; of the others, how many times as fast, and the picture's mean difference from it in levels of 255. In
brackets: that difference is over {PICTURE_GATE:g}, and the bundle does not count. {MISSING}: not in the run.
"""
_BEST = """
## The best bundle
The fastest whose picture passes, seconds by stage, and those of torch eager fp32. Host: the share outside engines.
"""
_CANVAS = f"""
## What the canvas costs
One guided step with the canvas against the step without, as a share of the latter; at most {100 * MOST_COST:g} % is wanted.
"""


def page(results: Path) -> str:
    """The page as Markdown, of the results in a folder."""
    found = {name: _report(results / f"{size}.json") for name, size in SIZES.items()}
    costs = {name: _report(results / f"canvas-{size}.json") for name, size in COSTS.items()}
    runs = {name: run for name, run in found.items() if run}
    canvas = {name: run for name, run in costs.items() if run}
    lines = [_HEAD, *_machines([*runs.values(), *canvas.values()])]
    lines += [_END_TO_END, _row("backbone", "threads", f"{EAGER}, s", *COLUMNS), _rule(3 + len(COLUMNS))]
    lines += [_row(name, *_ratios(run)) for name, run in runs.items()]
    lines += _not_measured(runs, SIZES)
    lines += [_BEST, _row("backbone", "bundle", *report.STAGES, "total, s", "host", "x eager", "x compile", "wanted", "")]
    lines += [_rule(11), *(_row(name, *_best(run, LEAST[name])) for name, run in runs.items())]
    targets = list(dict.fromkeys(target for run in canvas.values() for target in run["targets"]))
    lines += [_CANVAS, *([_row("backbone", *targets), _rule(1 + len(targets))] if targets else [])]
    lines += [_row(name, *(_cost(run, target) for target in targets)) for name, run in canvas.items()]
    lines += _not_measured(canvas, COSTS)
    return "\n".join(lines) + "\n"


def _report(file: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.from_json(file) if file.is_file() else None
    return found


def _machines(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every machine that a result comes from."""
    return [f"Machine: {text}." for text in dict.fromkeys(run["machine_text"] for run in runs)]


def _not_measured(runs: Mapping[str, Any], wanted: Iterable[str]) -> list[str]:
    """A line that names the backbones without a result."""
    missing = [name for name in wanted if name not in runs]
    return ["", f"Not measured yet: {', '.join(missing)}."] if missing else []


def _ratios(run: Mapping[str, Any]) -> list[str]:
    """Threads, seconds of eager fp32, every other's ratio and its picture's error; in brackets where that fails the gate."""
    contestants = run["contestants"]
    cells = [str(run["request"]["threads"]), f"{contestants[EAGER]['seconds']['total']['median']:.1f}"]
    for name in COLUMNS:
        entry = contestants.get(name)
        if entry is None:
            cells.append(MISSING)
            continue
        error = entry["check"]["picture_mean_error"]
        ratio = f"{entry['ratio']:.2f}, {error:.2f}"
        cells.append(ratio if error <= PICTURE_GATE else f"({ratio})")
    return cells


def _best(run: Mapping[str, Any], least: float) -> list[str]:
    """The best bundle's stages, its ratios, and whether it is as fast as wanted."""
    contestants = run["contestants"]
    best = best_bundle(contestants)
    if best is None:
        return ["none passes", *[MISSING] * 7, f"{least:g}", "missed"]
    own, eager, compiled = contestants[best], contestants[EAGER], contestants.get(COMPILED)
    stages = [
        f"{own['seconds'][stage]['median']:.2f} of {eager['seconds'][stage]['median']:.2f}"
        for stage in (*report.STAGES, "total")
    ]
    against = MISSING if compiled is None else f"{own['ratio'] / compiled['ratio']:.2f}"
    verdict = "met" if own["ratio"] >= least else "missed"
    return [best, *stages, f"{100 * own['host_share']:.1f} %", f"{own['ratio']:.2f}", against, f"{least:g}", verdict]


def _cost(run: Mapping[str, Any], target: str) -> str:
    entry = run["targets"].get(target)
    return MISSING if entry is None else f"{100 * entry['cost']:.1f} % of {1000 * entry['seconds_without']:.0f} ms"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return _row(*["---"] * columns)


def main() -> None:
    """Command line."""
    print(page(report.RESULTS), end="")


if __name__ == "__main__":
    main()
