"""Instructions of all four tasks, with what they are given and the film they ask for; a tenth of them is held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.shapes.data import COLOURS, KINDS, Shape, draw
from examples.shapes.video.world import (
    DIRECTIONS,
    PHRASES,
    RELATIONS,
    THINGS,
    Film,
    Thing,
    anywhere,
    from_words,
    reference_shape,
)

TASKS = ("text-to-video", "image-to-video", "video-editing", "in-context-video")
EDITS = ("recolour", "remove", "reshape")
STILL_SHARE = 0.08
"""Share of the films in which nothing moves."""
LONE_SHARE = 0.4
"""Share of the films with one shape."""


@dataclass(frozen=True)
class Case:
    """One instruction.

    Attributes:
        task: as `mc-runtime` names it.
        prompt: the words.
        target: the film they ask for.
        reference: the shape on an in-context case's picture.
        source: the film to edit.
        edited: which of its shapes the edit names, and how; None where the task is another.
    """

    task: str
    prompt: str
    target: Film
    reference: Shape | None = None
    source: Film | None = None
    edited: tuple[int, str] | None = None

    @property
    def picture(self) -> Image.Image | None:
        """What an image-to-video case begins with, or the reference of an in-context one, RGB, 64 x 64."""
        if self.reference is not None:
            return draw([self.reference])
        return draw(self.target.shapes(0)) if self.task == "image-to-video" else None

    @property
    def clip(self) -> NDArray[np.uint8] | None:
        """The frames to edit, u8 `[FRAMES, 64, 64, 3]`."""
        return None if self.source is None else self.source.frames()

    @property
    def held_out(self) -> bool:
        """True for the tenth of all instructions that training never sees: of its words and the things it shows, wherever they
        stand."""
        films = [film for film in (self.source, self.target) if film is not None]
        shown = " | ".join(", ".join(f"{actor.thing.phrase} {actor.motion}" for actor in film.actors) for film in films)
        return hashlib.sha256(f"{self.task}: {self.prompt}: {shown}".encode()).digest()[0] < 26


def sample_case(task: str, held_out: bool, rng: random.Random) -> Case:
    """A case of one task, of the training's or of the held out ones."""
    while True:
        case = _MAKERS[task](rng)
        if case.held_out == held_out:
            return case


def sample_cases(count: int, held_out: bool, rng: random.Random, tasks: tuple[str, ...] = TASKS) -> list[Case]:
    """As many of each task, task after task in turn."""
    return [sample_case(tasks[index % len(tasks)], held_out, rng) for index in range(count)]


def _words(rng: random.Random) -> tuple[tuple[Thing, ...], str, str | None]:
    """Things, motion and relation of a film from words."""
    if rng.random() < STILL_SHARE:
        return (rng.choice(THINGS),), "still", None
    motion = rng.choice(DIRECTIONS)
    if rng.random() < LONE_SHARE:
        return (rng.choice(THINGS),), motion, None
    first, second = rng.sample(THINGS, 2)
    return (first, second), motion, rng.choice(RELATIONS[motion])


def _sentence(subject: str, things: tuple[Thing, ...], motion: str, relation: str | None) -> str:
    sentence = f"{subject} {PHRASES[motion]}"
    return sentence if relation is None else f"{sentence} {relation} a {things[1].phrase}"


def _from_text(rng: random.Random) -> Case:
    things, motion, relation = _words(rng)
    prompt = _sentence(f"a {things[0].phrase}", things, motion, relation)
    return Case("text-to-video", prompt, from_words(things, motion, relation))


def _in_context(rng: random.Random) -> Case:
    things, motion, relation = _words(rng)
    prompt = _sentence("this shape", things, motion, relation)
    return Case("in-context-video", prompt, from_words(things, motion, relation), reference_shape(things[0], rng))


def _scene(rng: random.Random) -> Film:
    motion = "still" if rng.random() < STILL_SHARE else rng.choice(DIRECTIONS)
    things = (rng.choice(THINGS),) if rng.random() < LONE_SHARE else tuple(rng.sample(THINGS, 2))
    return anywhere(things, motion, rng)


def _called(film: Film, index: int, rng: random.Random) -> str:
    """A shape of the film by words that fit no other of its shapes."""
    thing = film.actors[index].thing
    if sum(actor.thing.kind == thing.kind for actor in film.actors) == 1 and rng.random() < 0.5:
        return f"the {thing.kind}"
    return f"the {thing.phrase}"


def _from_picture(rng: random.Random) -> Case:
    film = _scene(rng)
    prompt = f"{_called(film, 0, rng)} {PHRASES[film.motion]}"
    return Case("image-to-video", prompt, film)


def _editing(rng: random.Random) -> Case:
    source = _scene(rng)
    edit = rng.choice(EDITS if len(source.actors) > 1 else EDITS[:1] + EDITS[2:])
    index = rng.randrange(len(source.actors))
    name, thing = _called(source, index, rng), source.actors[index].thing
    others = [actor.thing for other, actor in enumerate(source.actors) if other != index]
    if edit == "remove":
        target = Film(tuple(actor for other, actor in enumerate(source.actors) if other != index))
        return Case("video-editing", f"remove {name}", target, source=source, edited=(index, edit))
    if edit == "recolour":
        choices = [thing._replace(colour=colour) for colour in COLOURS if colour != thing.colour]
        made = rng.choice([choice for choice in choices if choice not in others])
        prompt = f"make {name} {made.colour}"
    else:
        choices = [thing._replace(kind=kind) for kind in KINDS if kind != thing.kind]
        made = rng.choice([choice for choice in choices if choice not in others])
        prompt = f"turn {name} into a {made.kind}"
    return Case("video-editing", prompt, source.changed(index, thing=made), source=source, edited=(index, edit))


_MAKERS: dict[str, Callable[[random.Random], Case]] = {
    "text-to-video": _from_text,
    "image-to-video": _from_picture,
    "video-editing": _editing,
    "in-context-video": _in_context,
}
