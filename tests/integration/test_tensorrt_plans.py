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
