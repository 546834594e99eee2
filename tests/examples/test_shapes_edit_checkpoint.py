"""The shipped editing checkpoint is small, does what held-out instructions say, and needs its canvas for it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from examples.shapes.data import draw
from examples.shapes.edit import data
from examples.shapes.edit.evaluate import evaluate, shares
from examples.shapes.edit.judge import judge
from examples.shapes.edit.models import STEPS
from mc_export.reference import ReferencePipeline
from mc_runtime import Runtime
from mc_runtime.cli import demo

CHECKPOINT = demo.CHECKPOINTS["demo-edit"]
ASKED = (
    data.Instruction("recolour", "red", "circle", "blue"),
    data.Instruction("move", "red", "circle", "down"),
    data.Instruction("remove", "yellow", "triangle"),
)
"""Of the picture that ships with it; the second is held out."""


@pytest.fixture(scope="module")
def pipeline() -> ReferencePipeline:
    return ReferencePipeline.from_checkpoint(CHECKPOINT)


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 15_000_000


def test_it_edits_by_held_out_instructions(pipeline: ReferencePipeline) -> None:
    found = shares(evaluate(partial(pipeline.generate, steps=STEPS), count=20, seed=0))
    assert found["correct"] >= 0.6
    assert found["kept"] >= 0.9
    assert found["drift"] < 4


def test_without_its_canvas_it_does_not(pipeline: ReferencePipeline) -> None:
    trials = evaluate(partial(pipeline.generate, steps=STEPS, canvas=False), count=8, seed=0)
    assert shares(trials)["correct"] <= 0.25


@pytest.mark.matrix
@pytest.mark.integration
def test_the_command_edits_the_picture_that_ships_with_it(tmp_path: Path) -> None:
    """`mc-runtime generate demo-edit`, in a process that cannot import torch."""
    source = CHECKPOINT.parent / "input.png"
    assert Image.open(source).tobytes() == draw([placed.shape for placed in data.SAMPLE]).tobytes()
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)\n"
        "from mc_runtime.cli.main import main\nif __name__ == '__main__':\n    main()"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for instruction in ASKED:
        line = ["generate", "demo-edit", instruction.text, "--image", str(source), "-o", str(tmp_path / "out.png")]
        done = subprocess.run([sys.executable, "-c", code, *line], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        verdict = judge(data.Edit(data.SAMPLE, instruction), Image.open(tmp_path / "out.png"))
        assert verdict.correct, (instruction.text, verdict)


@pytest.mark.matrix
@pytest.mark.integration
def test_its_bundle_edits_as_torch_does(pipeline: ReferencePipeline) -> None:
    runtime = Runtime.load(demo.demo_bundle("demo-edit", quiet=True), threads=1)
    theirs = evaluate(partial(pipeline.generate, steps=STEPS), count=8, seed=3)
    ours = evaluate(partial(runtime.generate, steps=STEPS), count=8, seed=3)
    assert [trial.verdict.correct for trial in ours] == [trial.verdict.correct for trial in theirs]
