"""docs/matrix.md says what was recorded of the matrix, and the record is read from pytest's reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import matrix, report
from tests.export.backbones.test_inductor_engines import ENGINES
from tests.export.backbones.test_inductor_engines import TOLERANCE as PACKAGES
from tests.integration.test_matrix import CELLS

REPORT = """<testsuites><testsuite timestamp="2026-11-21T18:15:57.399467+00:00">
<testcase classname="tests.integration.test_matrix" name="test_x[flux-kontext-stock-openvino-bf16]" time="3.25"><properties>
<property name="text-to-image guided" value="0.01 0.5 3"/><property name="text-to-image unguided" value="0.02 0.25 2"/>
</properties></testcase>
<testcase classname="tests.integration.test_matrix" name="test_x[sana-stock-openvino-fp32]" time="1"><failure/></testcase>
<testcase classname="tests.integration.test_matrix" name="test_x[sana-stock-tensorrt-fp32]" time="0"><skipped/></testcase>
<testcase classname="tests.export.backbones.test_inductor_engines" name="test_y[wan-metacanvas-step-fp32]" time="60">
<properties><property name="relative_l2" value="3.1e-07"/></properties></testcase>
<testcase classname="tests.export.test_build" name="test_z[sana-stock-openvino-fp32]" time="1"/>
</testsuite></testsuites>"""


def test_the_page_is_what_was_recorded() -> None:
    mend = "run `python -m benchmarks.matrix REPORT.xml`"
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page(matrix.recorded()), mend


def test_what_was_recorded_is_of_the_matrix() -> None:
    bundles = {(cell.backbone.name, cell.kind, cell.target, str(cell.precision)) for cell in CELLS}
    packages = {(name, engine, str(precision)) for name, listed in ENGINES for engine in listed for precision in PACKAGES}
    for row in matrix.recorded()["rows"]:
        if row["test"] == matrix.BUNDLES:
            assert (row["backbone"], row["kind"], row["target"], row["precision"]) in bundles
        else:
            assert (row["checkpoint"], row["engine"], row["precision"]) in packages


def test_a_report_is_read_and_newer_cells_take_the_place_of_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.xml"
    file.write_text(REPORT)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "matrix.md")
    assert matrix.main([str(file)]) == 1, "one cell fails"
    rows = matrix.recorded()["rows"]
    assert [(row.get("backbone") or row["checkpoint"], row["passed"]) for row in rows] == [
        ("sana", False), ("flux-kontext", True), ("wan-metacanvas", True),
    ]  # fmt: skip
    assert rows[1]["cases"]["text-to-image unguided"] == {"relative_l2": 0.02, "mean_levels": 0.25, "max_levels": 2}
    file.write_text(
        REPORT.replace("<failure/>", '<properties><property name="text-to-image guided" value="3e-7 0 0"/></properties>')
    )
    assert matrix.main([str(file)]) == 0
    lines = matrix.PAGE.read_text().splitlines()
    assert "| sana | stock | not run | not run | 3.0e-07 | not run | not run | below | below |" in lines
    assert any(line.startswith("| flux-kontext | stock | not run | not run | not run | 0.02 |") for line in lines)
    assert "| wan-metacanvas | `step` | 3.1e-07 | not run |" in lines
