"""Every engine of every tiny checkpoint as a plan of TensorRT for RTX, and the table of docs/tensorrt.md that lists them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import plans
from mc_runtime.bundle.manifest import Precision
from mc_runtime.bundle.store import open_bundle

CHECKPOINTS = plans.checkpoints()


def listed() -> dict[str, set[str]]:
    """The engines of the recorded table, by checkpoint."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in plans.recorded():
        found[row["checkpoint"]].add(row["component"])
    return found


def test_the_page_has_the_recorded_table() -> None:
    mend = "run `python -m benchmarks.plans`"
    assert plans.PAGE.read_text(encoding="utf-8") == plans.page_with(plans.recorded()), mend
    assert set(listed()) <= set(CHECKPOINTS), mend


def test_precisions_stand_side_by_side() -> None:
    row = {"checkpoint": "wan stock", "component": "step", "bytes": 1000, "library": 1.0, "seconds": 2.0, "relative_l2": 0.01}
    rows = [row | {"precision": "bf16"}, row | {"precision": "fp16", "relative_l2": 0.002}]
    rows.append(row | {"precision": "bf16", "component": "vision"})
    lines = plans.table(rows).splitlines()
    assert lines[0].endswith("| error of its graph, bf16 | error of its graph, fp16 |")
    assert lines[2] == "| wan stock | `step` | 1 | 1 | 1.0 | 1.0 | 2 | 2 | 1.0e-02 | 2.0e-03 |"
    assert lines[3] == "| wan stock | `vision` | 1 | - | 1.0 | - | 2 | - | 1.0e-02 | - |"


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision"), [*((name, Precision.BF16) for name in CHECKPOINTS), ("sana metacanvas", Precision.FP16)]
)
def test_every_engine_builds(name: str, precision: Precision, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    checkpoint = CHECKPOINTS[name](tmp_path / "checkpoint")
    rows = plans.plan_rows(name, checkpoint, tmp_path / "bundle", precision)
    if name in listed():
        assert {row.component for row in rows} == listed()[name]
    for component, engine in open_bundle(tmp_path / "bundle").manifest.engines.items():
        assert engine.target == "tensorrt-rtx", component
        assert engine.error is not None
        assert engine.error.of == "graph" or engine.error.relative_l2 > 0
