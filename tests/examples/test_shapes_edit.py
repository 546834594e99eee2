"""The editing demo's world is consistent, nothing held out is trained on, and its judge sees every way to be wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from examples.shapes.data import BACKGROUND, SIDE, Shape, draw
from examples.shapes.edit import data
from examples.shapes.edit.data import Edit, Instruction, Placed
from examples.shapes.edit.evaluate import contact_sheet, evaluate, report, shares
from examples.shapes.edit.judge import judge
from examples.shapes.edit.models import CALIBRATION, CONFIG, GRID, build_image_processor, build_planner
from examples.shapes.edit.prompts import Eyes, read_instructions, to_pixels
from examples.shapes.edit.train_planner import FINENESS, labels
from examples.shapes.processor import train_tokenizer
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.planner import Planner


def edit_of(operation: data.Operation, value: str = "") -> Edit:
    """Three shapes, of which the red circle in the middle is named."""
    fields = (("red", "circle", (1, 1)), ("blue", "square", (0, 0)), ("green", "cross", (2, 1)))
    placed = tuple(
        Placed(Shape(colour, kind, data.RASTER[x] + 0.4, data.RASTER[y] - 0.7, data.SIZE), (x, y))
        for colour, kind, (x, y) in fields
    )
    return Edit(placed, Instruction(operation, "red", "circle", value))


def test_instructions_are_unique_and_equally_long() -> None:
    texts = [instruction.text for instruction in data.all_instructions()]
    assert len(set(texts)) == len(texts)
    assert {len(text.split()) for text in texts} == {5}


def test_held_out_is_about_a_tenth_disjoint_and_of_every_operation() -> None:
    training, held_out = data.split()
    assert not {each.text for each in training} & {each.text for each in held_out}
    assert 0.08 < len(held_out) / len(data.all_instructions()) < 0.14
    assert {each.operation for each in held_out} == set(data.OPERATIONS)
    assert not any(edit.instruction.held_out for edit in data.sample(training, 500, random.Random(0)))


def test_calibration_is_of_training() -> None:
    training, _ = data.split()
    assert set(CALIBRATION) <= {each.text for each in training}


def test_data_is_the_same_for_a_seed() -> None:
    first, again, other = (data.sample(data.all_instructions(), 20, random.Random(seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first[0].pictures()[1].tobytes() == again[0].pictures()[1].tobytes()


def test_pictures_are_what_the_judge_reads_in_them() -> None:
    """What should come out is correct; the original itself never is."""
    for edit in data.sample(data.all_instructions(), 150, random.Random(0)):
        before, after = edit.pictures()
        assert judge(edit, after).correct, edit
        assert judge(edit, after).drift < 0.5
        assert not judge(edit, before).done, edit
        assert judge(edit, before).kept


@pytest.mark.parametrize(
    ("operation", "value", "expected"),
    [
        ("recolour", "blue", Shape("blue", "circle", 32.4, 31.3, data.SIZE)),
        ("reshape", "cross", Shape("red", "cross", 32.4, 31.3, data.SIZE)),
        ("move", "up", Shape("red", "circle", 32.4, 10.3, data.SIZE)),
        ("remove", "", None),
    ],
)
def test_what_comes_out_is_a_function_of_picture_and_instruction(
    operation: data.Operation, value: str, expected: Shape | None
) -> None:
    edit = edit_of(operation, value)
    if expected is None:
        assert edit.changed is None
    else:
        assert edit.changed is not None
        assert edit.changed.shape == pytest.approx(expected)
    assert edit.kept == edit.placed[1:]


def without(shapes: list[Shape], kind: str) -> list[Shape]:
    return [shape for shape in shapes if shape.kind != kind]


def altered(shapes: list[Shape], kind: str, /, **values: object) -> list[Shape]:
    return [shape._replace(**values) if shape.kind == kind else shape for shape in shapes]


BLUE = edit_of("recolour", "blue")


@pytest.mark.parametrize(
    ("edit", "drawn", "fails"),
    [
        (BLUE, BLUE.source, {"done"}),
        (BLUE, altered(BLUE.target, "circle", colour="green"), {"done"}),
        (BLUE, altered(BLUE.target, "circle", kind="triangle"), {"done"}),
        (BLUE, altered(BLUE.target, "circle", x=28.0), {"done"}),
        (BLUE, altered(BLUE.target, "circle", size=20.0), {"done"}),
        (BLUE, without(BLUE.target, "circle"), {"done"}),
        (BLUE, altered(BLUE.target, "square", colour="red"), {"kept"}),
        (BLUE, altered(BLUE.target, "cross", kind="circle"), {"kept"}),
        (BLUE, altered(BLUE.target, "cross", y=36.0), {"kept"}),
        (BLUE, altered(BLUE.target, "cross", size=19.5), {"kept"}),
        (BLUE, without(BLUE.target, "square"), {"kept"}),
        (BLUE, [*BLUE.target, Shape("black", "cross", 11, 53, 15)], {"nothing_else"}),
        (edit_of("remove"), BLUE.source, {"done", "nothing_else"}),
        (edit_of("remove"), BLUE.target, {"done", "nothing_else"}),
        (edit_of("move", "down"), BLUE.source, {"done"}),
        (edit_of("move", "down"), [*edit_of("move", "down").target, BLUE.source[0]], {"nothing_else"}),
        (edit_of("move", "down"), edit_of("move", "up").target, {"done"}),
        (edit_of("reshape", "cross"), altered(BLUE.source, "circle", kind="square"), {"done"}),
    ],
)  # fmt: skip
def test_judge_catches_a_wrong_edit(edit: Edit, drawn: list[Shape], fails: set[str]) -> None:
    verdict = judge(edit, draw(drawn))
    assert not verdict.correct
    assert {name for name in ("done", "kept", "nothing_else") if not getattr(verdict, name)} == fails


def test_drift_is_of_what_should_not_change() -> None:
    pixels = np.asarray(draw(BLUE.target)).copy()
    inside, outside = pixels.copy(), pixels.copy()
    inside[28:36, 28:36] = BACKGROUND
    outside[56:, :] = 0
    clean, spoilt = (judge(BLUE, Image.fromarray(each)).drift for each in (inside, outside))
    assert clean < 0.5
    assert spoilt > 20


def test_evaluation_of_a_perfect_editor_is_perfect() -> None:
    edits = {edit.pictures()[0].tobytes(): edit for edit in data.sample(data.split()[1], 24, random.Random("evaluation 1"))}

    def perfect(text: str, *, image: Image.Image, seed: int) -> SimpleNamespace:
        edit = edits[image.tobytes()]
        assert text == edit.instruction.text
        return SimpleNamespace(images=[edit.pictures()[1]])

    trials = evaluate(perfect, count=24, seed=1)
    found = shares(trials)
    assert all(trial.edit.instruction.held_out for trial in trials)
    assert {found[name] for name in ("done", "kept", "nothing_else", "correct", *data.OPERATIONS)} == {1.0}
    assert report(trials, {"seed": 1})["shares"] == found
    assert contact_sheet(trials).height > 6 * SIDE


def test_labels_mark_what_comes_out() -> None:
    parts = labels([Shape("black", "cross", 11.0, 53.0, 15.0)]).reshape(GRID, GRID, FINENESS**2)
    assert set(parts[GRID // 2 :, : GRID // 2].ravel()) == {0, 24}
    assert not parts[: GRID // 2].any()


@pytest.fixture(scope="module")
def planner():  # type: ignore[no-untyped-def]  # its tokenizer's class is transformers', which mypy does not follow
    tokenizer = train_tokenizer("user\n" + instruction.text for instruction in data.all_instructions())
    torch.manual_seed(0)
    return Planner(build_planner(tokenizer), CanvasModel(CONFIG, 128, 128, 128, 64).canvas_tokens).eval(), tokenizer


def test_many_pictures_at_once_are_seen_as_one_by_one(planner) -> None:  # type: ignore[no-untyped-def]
    """The batched eyes of training against transformers' processor and tower."""
    model, _ = planner
    images = [edit.pictures()[0] for edit in data.sample(data.all_instructions(), 3, random.Random(5))]
    read = [build_image_processor()(image, return_tensors="pt") for image in images]
    eyes = Eyes(model)
    patches = eyes.patches(to_pixels(images)).flatten(0, 1)
    torch.testing.assert_close(patches, torch.cat([each.pixel_values for each in read]), rtol=0, atol=1e-6)
    with torch.no_grad():
        alone = torch.cat([model.see(each.pixel_values, each.image_grid_thw) for each in read])
        torch.testing.assert_close(eyes(to_pixels(images)), alone, rtol=1e-4, atol=1e-5)


def test_every_instruction_of_a_batch_has_its_own_picture(planner) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = planner
    edits = data.sample(data.all_instructions(), 2, random.Random(6))
    texts = [edit.instruction.text for edit in edits]
    instructions = read_instructions(model, tokenizer, texts)
    pictures = to_pixels([edit.pictures()[0] for edit in edits])
    eyes = Eyes(model)
    with torch.no_grad():
        both = model(**instructions.rows(torch.tensor([0, 1])), vision=eyes(pictures))
        second = model(**instructions.rows(torch.tensor([1])), vision=eyes(pictures[1:]))
    torch.testing.assert_close(both.canvas[1:], second.canvas, rtol=1e-4, atol=1e-5)


def test_instructions_of_another_length_are_refused(planner) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="different lengths"):
        read_instructions(*planner, ["make the red circle blue", "make the circle blue"])


def test_an_edit_names_its_shape_whatever_the_order() -> None:
    edit = edit_of("move", "up")
    turned = replace(edit, placed=edit.placed[::-1])
    assert turned.named == edit.named
    assert set(turned.target) == set(edit.target)
