"""The demo's world is consistent: what is drawn is read back, and nothing held out is trained on."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from examples.shapes import data
from examples.shapes.detector import UNKNOWN, detect
from examples.shapes.evaluate import accuracy, choose, contact_sheet, evaluate, report
from examples.shapes.judge import Verdict, judge


def picture_of(caption: str, seed: int = 0) -> Image.Image:
    return data.draw(data.place(data.parse(caption), random.Random(seed)))


def test_captions_are_unique_and_parse_back() -> None:
    scenes = list(data.all_scenes())
    assert len({scene.caption for scene in scenes}) == len(scenes)
    assert all(data.parse(scene.caption) is scene or data.parse(scene.caption) == scene for scene in scenes)


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle",
        "three green triangles",
        "two black crosses",
        "a purple square in the top left corner",
        "two green triangles above a yellow square",
        "a red circle left of three blue crosses",
    ],
)
def test_grammar_says(caption: str) -> None:
    assert data.parse(caption).caption == caption


def test_unknown_caption_is_refused_with_an_example() -> None:
    with pytest.raises(ValueError, match="it says for example"):
        data.parse("five pink elephants")


def test_held_out_is_a_tenth_and_disjoint() -> None:
    training, held_out = data.split()
    assert not {scene.caption for scene in training} & {scene.caption for scene in held_out}
    assert 0.08 < len(held_out) / (len(training) + len(held_out)) < 0.12
    assert not any(scene.held_out for scene in data.sample(training, 1000, random.Random(0)))


def test_held_out_asks_for_everything() -> None:
    _, held_out = data.split()
    groups = [group for scene in held_out for group in scene.groups]
    assert {group.colour for group in groups} == set(data.COLOURS)
    assert {group.kind for group in groups} == set(data.KINDS)
    assert {scene.relation for scene in held_out} == {None, *data.RELATIONS}
    assert {scene.corner for scene in held_out} == {None, *data.CORNERS}


def test_detector_agrees_with_every_kind_of_scene() -> None:
    rng = random.Random(0)
    wrong = []
    for scene in data.sample(list(data.all_scenes()), 400, rng):
        verdict = judge(scene, data.draw(data.place(scene, rng)))
        if verdict != Verdict(True, True, True, True, None if verdict.position is None else True, True):
            wrong.append((scene.caption, verdict))
    assert not wrong


def test_detector_finds_places_and_sizes() -> None:
    shapes = [data.Shape("red", "circle", 17.0, 20.0, 20.0), data.Shape("blue", "square", 46.0, 44.0, 20.0)]
    seen = sorted(detect(data.draw(shapes)), key=lambda shape: shape.x)
    for shape, found in zip(shapes, seen, strict=True):
        assert (found.colour, found.kind) == (shape.colour, shape.kind)
        assert abs(found.x - shape.x) <= 1
        assert abs(found.y - shape.y) <= 1
        assert abs(found.size - shape.size) <= 2.5


def test_detector_refuses_blobs_and_strange_colours() -> None:
    touching = [data.Shape("red", "circle", 24.0, 32.0, 20.0), data.Shape("red", "circle", 40.0, 32.0, 20.0)]
    assert [shape.kind for shape in detect(data.draw(touching))] == [UNKNOWN]
    pink = Image.new("RGB", (data.SIDE, data.SIDE), data.BACKGROUND)
    pink.paste((255, 105, 180), (20, 20, 40, 40))
    assert [shape.colour for shape in detect(pink)] == [UNKNOWN]


def test_detector_sees_nothing_in_background_noise() -> None:
    noise = np.random.default_rng(0).normal(data.BACKGROUND, 10, (data.SIDE, data.SIDE, 3))
    assert detect(Image.fromarray(noise.clip(0, 255).astype(np.uint8))) == []


def test_drawing_is_deterministic_for_a_seed() -> None:
    caption = "two red circles left of a blue square"
    assert picture_of(caption, 5).tobytes() == picture_of(caption, 5).tobytes()
    assert picture_of(caption, 5).tobytes() != picture_of(caption, 6).tobytes()


@pytest.mark.parametrize(
    ("asked", "drawn", "fails"),
    [
        ("a red circle left of a blue square", "a blue square left of a red circle", {"position"}),
        ("a red circle left of a blue square", "a red square left of a blue circle", {"binding", "position"}),
        ("two red circles", "three red circles", {"count"}),
        ("two red circles", "two green circles", {"colour", "binding"}),
        ("two red circles", "two red squares", {"kind", "binding"}),
        ("a red circle in the top left corner", "a red circle in the bottom left corner", {"position"}),
    ],
)
def test_judge_names_what_is_wrong(asked: str, drawn: str, fails: set[str]) -> None:
    verdict = judge(data.parse(asked), picture_of(drawn))
    assert not verdict.overall
    assert {name for name, right in vars(verdict).items() if right is False} == {*fails, "overall"}


def test_evaluation_of_a_perfect_painter_is_perfect() -> None:
    class Drawn:
        def __init__(self, prompts: list[str], seed: int) -> None:
            self.images = [picture_of(prompt, seed) for prompt in prompts]

    trials = evaluate(Drawn, count=30, seed=1)
    assert set(accuracy(trials).values()) == {1.0}
    assert all(trial.scene.held_out for trial in trials)
    assert len({trial.scene.caption for trial in trials}) == 30
    assert report(trials, {"seed": 1})["accuracy"]["overall"] == 1.0
    assert contact_sheet(trials).width > 6 * data.SIDE


def test_evaluation_can_ask_for_every_held_out_caption_and_no_more() -> None:
    _, held_out = data.split()
    assert set(choose(len(held_out), random.Random(0))) == set(held_out)
    with pytest.raises(ValueError, match="captions are held out"):
        choose(len(held_out) + 1, random.Random(0))
