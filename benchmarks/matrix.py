"""What the tests of the matrix measured: benchmarks/results/matrix.json and docs/matrix.md, from pytest's JUnit reports.

    make test-all ARGS="-m matrix --junitxml=out/matrix.xml"
    python -m benchmarks.matrix out/matrix.xml

Several reports may be given, of parts of the matrix; what was recorded of other cells before is kept.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import report
from mc_export.backbones.registry import BACKBONES
from mc_export.build.options import PRECISIONS
from mc_export.lower import takes_programs
from mc_export.support import GPU_TARGETS, markdown_table

RESULT = "matrix"
PAGE = report.ROOT / "docs" / "matrix.md"
BUNDLES = "tests.integration.test_matrix"
PACKAGES = "tests.export.backbones.test_inductor_engines"
COLUMNS = [(target, precision) for target, there in PRECISIONS.items() if target not in GPU_TARGETS for precision in there]
_CELL = re.compile(r"\[(?P<backbone>.+)-(?P<kind>metacanvas|stock)-(?P<target>\w+)-(?P<precision>\w+)\]$")
_ENGINE = re.compile(r"\[(?P<checkpoint>[\w-]+)-(?P<engine>\w+)-(?P<precision>\w+)\]$")

_HEAD = """# What the matrix measured

Written by `python -m benchmarks.matrix` from the reports of the tests that are marked `matrix`.
{when}, on {machine}; {versions}.

## Whole bundles
Every backbone, a MetaCanvas checkpoint and a stock one, in every task of it: relative L2 of the final latents against torch in
fp32, two results at once, three steps; the worst over tasks and sizes, with guidance and without. Weights are tiny and random:
below fp32 a figure says that a bundle is sane, not how good a trained one is. In fp32 pictures are the same to one level of
255. With `inductor` the step is compiled, and the other engines are onnxruntime's; stock steps are among the packages below.

"""
_PACKAGES = """
## Compiled packages
Engines of the tiny checkpoints as AOTInductor packages for the CPU, those that were run: relative L2 against the torch module,
the worst over outputs, at the sizes of the export and at others. Of a checkpoint with a canvas only its own engines are here.

"""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The cells of a JUnit report that ran, each with what was measured; those that were skipped are left out."""
    rows = []
    root = ElementTree.parse(file).getroot()
    date = next(root.iter("testsuite")).get("timestamp", "")[:10]
    for case in root.iter("testcase"):
        test = case.get("classname")
        found = {BUNDLES: _CELL, PACKAGES: _ENGINE}[test].search(case.get("name", "")) if test in (BUNDLES, PACKAGES) else None
        if found is None or case.find("skipped") is not None:
            continue
        measured = {item.get("name", ""): item.get("value", "") for item in case.iter("property")}
        passed = case.find("failure") is None and case.find("error") is None
        row = {"test": test, **found.groupdict(), "passed": passed, "date": date}
        if test == BUNDLES:
            row["cases"] = {name: _figures(value) for name, value in measured.items()}
        elif "relative_l2" in measured:
            row["relative_l2"] = float(measured["relative_l2"])
        rows.append(row)
    return rows


def _figures(text: str) -> dict[str, float]:
    names = ("relative_l2", "mean_levels", "max_levels")
    return dict(zip(names, map(float, text.split()), strict=True))


def merged(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of both in the order of the tests, those of `after` in the place of older ones of the same cell."""
    rows = {_cell(row): row for row in (*before, *after)}
    names = [backbone.name for backbone in BACKBONES]
    return [rows[cell] for cell in sorted(rows, key=lambda cell: (names.index(cell[1]) if cell[1] else len(names), cell))]


def _cell(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row.get(part, "") for part in ("test", "backbone", "kind", "target", "checkpoint", "engine", "precision"))


def page(result: dict[str, Any]) -> str:
    """The whole of docs/matrix.md."""
    versions = ", ".join(
        f"{name} {result['versions'][name]}"
        for name in ("torch", "diffusers", "transformers", "onnxruntime", "openvino", "nncf")
    )
    days = sorted({row["date"] for row in result["rows"]})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    head = _HEAD.format(when=when, machine=result["machine_text"], versions=versions)
    bundles = [row for row in result["rows"] if row["test"] == BUNDLES]
    packages = [row for row in result["rows"] if row["test"] == PACKAGES]
    return head + _bundles(bundles) + _PACKAGES + (_packages(packages) if packages else "Not run yet.\n")


def _bundles(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for backbone, kind in ((one.name, kind) for one in BACKBONES for kind in ("metacanvas", "stock")):
        found = {(row["target"], row["precision"]): row for row in rows if (row["backbone"], row["kind"]) == (backbone, kind)}
        others = ["below" if kind == "stock" and takes_programs(target) else "not run" for target, _ in COLUMNS]
        shown = [_shown(found.get(column), other) for column, other in zip(COLUMNS, others, strict=True)]
        lines.append((backbone, kind, *shown))
    return markdown_table(("backbone", "checkpoint", *(f"{target} {precision}" for target, precision in COLUMNS)), lines)


def _packages(rows: Sequence[dict[str, Any]]) -> str:
    precisions = PRECISIONS["inductor"]
    lines = []
    for checkpoint, engine in dict.fromkeys((row["checkpoint"], row["engine"]) for row in rows):
        found = {row["precision"]: row for row in rows if (row["checkpoint"], row["engine"]) == (checkpoint, engine)}
        lines.append((checkpoint, f"`{engine}`", *(_shown(found.get(precision)) for precision in precisions)))
    return markdown_table(("checkpoint", "engine", *precisions), lines)


def _shown(row: dict[str, Any] | None, other: str = "not run") -> str:
    if row is None:
        return other
    errors = [case["relative_l2"] for case in row.get("cases", {}).values()] or [row.get("relative_l2")]
    if not row["passed"] or None in errors:
        return "**fails**"
    return f"{max(errors):.1e}" if max(errors) < 1e-3 else f"{max(errors):.2g}"


def recorded() -> dict[str, Any]:
    """benchmarks/results/matrix.json; no rows where there is no such file yet."""
    try:
        found: dict[str, Any] = json.loads((report.RESULTS / f"{RESULT}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"rows": []}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is the number of recorded cells that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.xml")
    arguments = parser.parse_args(argv)
    new = [row for file in arguments.reports for row in read_rows(file)]
    result = {"benchmark": RESULT, **report.card(), "rows": merged(recorded()["rows"], new)}
    report.save(RESULT, result)
    PAGE.write_text(page(result), encoding="utf-8")
    return sum(not row["passed"] for row in result["rows"])


if __name__ == "__main__":
    raise SystemExit(main())
