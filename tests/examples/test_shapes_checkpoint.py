"""The shipped checkpoint opens, is small, and draws what held-out captions ask for because of its canvas."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from examples.shapes.evaluate import accuracy, evaluate
from mc_export.reference import ReferencePipeline

CHECKPOINT = Path(__file__).parents[2] / "examples" / "shapes" / "checkpoint"


@pytest.fixture(scope="module")
def pipeline() -> ReferencePipeline:
    return ReferencePipeline.from_checkpoint(CHECKPOINT)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 15_000_000


def test_it_draws_held_out_captions(pipeline: ReferencePipeline) -> None:
    trials = evaluate(partial(pipeline.generate, steps=10), count=20, seed=0)
    assert accuracy(trials)["overall"] >= 0.9


def test_without_its_canvas_it_draws_none_of_them(pipeline: ReferencePipeline) -> None:
    trials = evaluate(partial(pipeline.generate, steps=10, canvas=False), count=20, seed=0)
    assert accuracy(trials)["overall"] <= 0.1
