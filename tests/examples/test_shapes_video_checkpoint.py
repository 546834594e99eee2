"""The shipped video checkpoint opens, is small, and films held-out instructions of all four tasks because of its canvas."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest

from examples.shapes.video.cases import TASKS, Case, sample_cases
from examples.shapes.video.evaluate import by_task, evaluate
from mc_export.reference import ReferencePipeline

CHECKPOINT = Path(__file__).parents[2] / "examples" / "shapes" / "video" / "checkpoint"


def cases(each: int) -> list[Case]:
    return sample_cases(each * len(TASKS), True, random.Random(11))


@pytest.fixture(scope="module")
def pipeline() -> ReferencePipeline:
    return ReferencePipeline.from_checkpoint(CHECKPOINT)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 15_000_000


def test_it_says_its_own_defaults(pipeline: ReferencePipeline) -> None:
    defaults = pipeline.checkpoint.defaults
    assert (defaults.guidance_scale, defaults.frames, defaults.fps) == (1.0, 9, 8.0)
    assert pipeline.checkpoint.config is not None
    assert set(pipeline.checkpoint.config.tasks) == set(TASKS)


def test_it_films_an_instruction_of_every_task(pipeline: ReferencePipeline) -> None:
    trials = evaluate(partial(pipeline.generate, steps=8), cases(2), seed=0)
    assert by_task(trials)["all"]["overall"] >= 0.5


def test_without_its_canvas_it_films_none_of_them(pipeline: ReferencePipeline) -> None:
    trials = evaluate(partial(pipeline.generate, steps=8, canvas=False), cases(1), seed=0)
    assert by_task(trials)["all"]["overall"] == 0.0


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_its_bundle_films_every_task(target: str, tmp_path: Path) -> None:
    from mc_export.build import BuildOptions, build_bundle
    from mc_runtime import Runtime

    build_bundle(CHECKPOINT, tmp_path / "bundle", BuildOptions(target=target))
    trials = evaluate(Runtime.load(tmp_path / "bundle").generate, cases(5), seed=0)
    assert by_task(trials)["all"]["overall"] >= 0.75
