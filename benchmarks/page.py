"""The table of all backbones in docs/benchmarks.md, from the results that are there.

python -m benchmarks.page
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import mid, report
from benchmarks.end_to_end import EAGER, PICTURE_GATE

#: Contestants in the order of the columns; what was left out of a run is a dash.
COLUMNS = (
    "torch eager bf16", "torch compile fp32", "onnxruntime fp32", "onnxruntime int8", "openvino fp32", "openvino bf16",
    "openvino int8",
)  # fmt: skip
MISSING = "-"


def page(results: Path) -> str:
    """Both tables as Markdown: times eager fp32 end to end, and the canvas's share of a step."""
    sizes = {"sana": "mid"} | {name: f"mid-{name}" for name in mid.SUBJECTS}
    found = {name: _report(results / f"{size}.json") for name, size in sizes.items()}
    costs = {name: _report(results / f"canvas-{size}.json") for name, size in sizes.items()}
    lines = [_row("", f"{EAGER}, s", *COLUMNS), _row(*["---"] * (2 + len(COLUMNS)))]
    lines += [_row(name, *_ratios(of)) for name, of in found.items() if of]
    targets = list(dict.fromkeys(target for cost in costs.values() if cost for target in cost["targets"]))
    lines += ["", _row("", *targets), _row(*["---"] * (1 + len(targets)))]
    lines += [_row(name, *(_cost(cost, target) for target in targets)) for name, cost in costs.items() if cost]
    return "\n".join(lines) + "\n"


def _report(file: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.from_json(file) if file.is_file() else None
    return found


def _ratios(found: Mapping[str, Any]) -> list[str]:
    """Seconds of eager fp32, then every contestant's ratio and its picture's error; in brackets where that fails the gate."""
    contestants = found["contestants"]
    cells = [f"{contestants[EAGER]['seconds']['total']['median']:.1f}"]
    for name in COLUMNS:
        entry = contestants.get(name)
        if entry is None:
            cells.append(MISSING)
            continue
        error = entry["check"]["picture_mean_error"]
        ratio = f"{entry['ratio']:.2f}, {error:.2f}"
        cells.append(ratio if error <= PICTURE_GATE else f"({ratio})")
    return cells


def _cost(cost: Mapping[str, Any], target: str) -> str:
    entry = cost["targets"].get(target)
    return MISSING if entry is None else f"{100 * entry['cost']:.1f} % of {1000 * entry['seconds_without']:.0f} ms"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    print(page(report.RESULTS), end="")


if __name__ == "__main__":
    main()
