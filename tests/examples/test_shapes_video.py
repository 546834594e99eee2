"""The video demo's world is consistent: what is filmed is read back, nothing held out is trained on, failures are caught."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.shapes import data
from examples.shapes.video.cases import TASKS, Case, sample_case, sample_cases
from examples.shapes.video.evaluate import SHOWN, animation, by_task, contact_sheet, evaluate
from examples.shapes.video.judge import judge
from examples.shapes.video.world import FRAMES, MOTIONS, THINGS, Actor, Film, Thing, all_words, anywhere, from_words
from mc_runtime.media.clip import Clip

Frames = NDArray[np.uint8]


def cases_of(task: str, count: int, accept: Callable[[Case], bool] = lambda _: True, seed: int = 0) -> list[Case]:
    rng, found = random.Random(seed), []
    while len(found) < count:
        case = sample_case(task, True, rng)
        found += [case] if accept(case) else []
    return found


def filmed(film: Film) -> Frames:
    return film.frames()


def test_cases_are_the_same_for_a_seed_and_take_turns() -> None:
    first, again = (sample_cases(24, True, random.Random(3)) for _ in range(2))
    assert first == again
    assert [case.task for case in first[:4]] == list(TASKS)
    assert np.array_equal(first[0].target.frames(), again[0].target.frames())


def test_training_never_sees_a_held_out_instruction() -> None:
    rng = random.Random(0)
    training, held_out = (sample_cases(2000, held, rng) for held in (False, True))
    assert not {case.prompt for case in training if case.task == "text-to-video"} & {
        case.prompt for case in held_out if case.task == "text-to-video"
    }
    assert all(case.held_out for case in held_out)
    assert not any(case.held_out for case in training)


def test_a_tenth_of_all_words_is_held_out() -> None:
    films = [
        Case("text-to-video", f"{things} {motion} {side}", from_words(things, motion, side))
        for things, motion, side in all_words()
    ]
    assert 0.08 < sum(case.held_out for case in films) / len(films) < 0.12


def test_shapes_stay_inside_and_never_touch() -> None:
    rng = random.Random(1)
    films = [from_words(*words) for words in all_words()]
    films += [anywhere(tuple(rng.sample(THINGS, 2)), rng.choice(list(MOTIONS)), rng) for _ in range(2000)]
    for film in films:
        for frame in (0, FRAMES - 1):
            shapes = film.shapes(frame)
            assert all(
                shape.size / 2 <= place <= data.SIDE - shape.size / 2 for shape in shapes for place in (shape.x, shape.y)
            )
            if len(shapes) == 2:
                (a, b), gap = shapes, 2
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.size + gap


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_film_is_right_in_everything(task: str) -> None:
    for case in cases_of(task, 20):
        verdict = judge(case, filmed(case.target))
        assert verdict.overall, (case, verdict)
        assert verdict.kept is (True if task in ("image-to-video", "video-editing") else None)


def moved(case: Case) -> bool:
    return case.target.motion != "still"


def pair(case: Case) -> bool:
    return len(case.target.actors) == 2


def recoloured(film: Film, index: int = 0) -> Film:
    thing = film.actors[index].thing
    others = {actor.thing.colour for actor in film.actors}
    return film.changed(index, thing=thing._replace(colour=next(c for c in data.COLOURS if c not in others)))


def reshaped(film: Film, index: int = 0) -> Film:
    thing = film.actors[index].thing
    return film.changed(index, thing=thing._replace(kind=next(k for k in data.KINDS if k != thing.kind)))


def reversed_way(film: Film) -> Film:
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[film.motion]
    across, down = MOTIONS[film.motion]
    actor = film.actors[0]
    return film.changed(0, motion=opposite, x=actor.x + 16 * across, y=actor.y + 16 * down)


def wrong_names(case: Case, frames: Frames) -> set[str]:
    verdict = judge(case, frames)
    assert not verdict.overall
    return {name for name, right in vars(verdict).items() if right is False} - {"overall"}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("spoil", "property_"), [(recoloured, "colour"), (reshaped, "kind"), (reversed_way, "motion")], ids=lambda x: str(x)[:20]
)
def test_judge_catches_the_wrong_shape_and_the_wrong_way(task: str, spoil: Callable[[Film], Film], property_: str) -> None:
    for case in cases_of(task, 5, moved):
        assert property_ in wrong_names(case, filmed(spoil(case.target)))


def test_judge_catches_one_wrong_frame() -> None:
    (case,) = cases_of("text-to-video", 1, moved)
    frames = filmed(case.target).copy()
    frames[5] = filmed(recoloured(case.target))[5]
    assert wrong_names(case, frames) == {"colour"}


def test_judge_catches_what_should_move_and_stands_and_the_other_way_round() -> None:
    (moving,) = cases_of("image-to-video", 1, moved)
    still = moving.target.changed(0, motion="still")
    assert wrong_names(moving, filmed(still)) == {"motion"}
    (standing,) = cases_of("text-to-video", 1, lambda case: not moved(case))
    assert wrong_names(standing, filmed(standing.target.changed(0, motion="up"))) == {"motion"}


def test_judge_catches_the_wrong_one_moving() -> None:
    (case,) = cases_of("image-to-video", 1, lambda case: moved(case) and pair(case))
    first, second = case.target.actors
    swapped = Film((replace(first, motion="still"), replace(second, motion=first.motion)))
    assert "motion" in wrong_names(case, filmed(swapped))


def test_judge_catches_two_shapes_on_the_wrong_sides() -> None:
    things = (Thing("red", "circle"), Thing("blue", "square"))
    case = Case("text-to-video", "", from_words(things, "left", "above"))
    assert wrong_names(case, filmed(from_words(things, "left", "below"))) == {"motion"}


def test_judge_catches_another_first_frame() -> None:
    (case,) = cases_of("image-to-video", 1, moved)
    elsewhere = Film(tuple(replace(actor, x=actor.x + 6) for actor in case.target.actors))
    assert "kept" in wrong_names(case, filmed(elsewhere))


def test_judge_catches_what_an_edit_changed_beside_its_shape() -> None:
    def two(case: Case) -> bool:
        return pair(case) and case.edited is not None and case.edited[0] == 0

    (case,) = cases_of("video-editing", 1, two)
    other = case.target.actors[1]
    assert wrong_names(case, filmed(case.target.changed(1, y=other.y + 6, x=other.x + 6))) >= {"kept"}
    darker = filmed(case.target).astype(np.int16)
    darker[:, :, :, 2] -= 40
    assert "kept" in wrong_names(case, darker.clip(0, 255).astype(np.uint8))
    removed = cases_of("video-editing", 1, lambda case: case.edited is not None and case.edited[1] == "remove")[0]
    assert removed.source is not None
    assert {"colour", "kind"} & wrong_names(removed, filmed(removed.source))


def test_judge_wants_the_whole_film() -> None:
    (case,) = cases_of("text-to-video", 1)
    with pytest.raises(ValueError, match="9 frames"):
        judge(case, filmed(case.target)[:5])


def test_evaluation_of_a_perfect_painter_is_perfect_and_can_be_looked_at() -> None:
    cases = sample_cases(8, True, random.Random(2))
    given: list[dict[str, Any]] = []

    def generate(prompt: str, **arguments: Any) -> Any:
        case = next(case for case in cases if case.prompt == prompt and case.task == arguments["task"])
        given.append(arguments)
        return type("Result", (), {"clips": [Clip(case.target.frames(), 8.0)]})

    trials = evaluate(generate, cases, seed=5)
    assert set(by_task(trials)) == {*TASKS, "all"}
    assert all(shares["overall"] == 1.0 for shares in by_task(trials).values())
    assert [set(arguments) - {"task", "seed"} for arguments in given[:4]] == [set(), {"image"}, {"video"}, {"image"}]
    assert contact_sheet(trials).width > 2 * len(SHOWN) * data.SIDE
    assert len(animation(trials).frames) > FRAMES


def test_a_film_in_which_nothing_moves_is_one_picture() -> None:
    film = Film((Actor(Thing("red", "circle"), 32, 32),))
    assert (film.frames() == film.frames()[0]).all()
