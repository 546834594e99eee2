"""Films: one or two coloured shapes on plain ground, at most one of which moves, and the words for them.

A film is a function of its few numbers, so that a case's inputs fix its target: for a film from words the places are canonical;
for one that begins with a picture, or changes a clip, they are those of the picture or the clip.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.shapes.data import COLOURS, KINDS, Shape, draw

FRAMES = 9
FPS = 8.0
SIZE = 20
"""Width and height of a shape, in pixels."""
TRAVEL = 16.0
"""Pixels that a shape moves from the first frame to the last."""
PLACES = (18.0, 32.0, 46.0)
"""Rows and columns on which shapes stand at first; two of them are in the outer ones."""
MIDDLE, LANES = PLACES[1], (PLACES[0], PLACES[2])
JITTER = 1.5
"""Pixels that a shape of a picture or a clip may stand off its place, each way."""
REFERENCE_SIZE = 30

MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
DIRECTIONS = ("left", "right", "up", "down")
PHRASES = {
    "left": "moves to the left",
    "right": "moves to the right",
    "up": "moves up",
    "down": "moves down",
    "still": "stands still",
}
RELATIONS = {
    "left": ("above", "below"),
    "right": ("above", "below"),
    "up": ("left of", "right of"),
    "down": ("left of", "right of"),
}
"""Where the moving shape may be, beside one that stands still: never in its way."""


class Thing(NamedTuple):
    """What a shape is, wherever it is."""

    colour: str
    kind: str

    @property
    def phrase(self) -> str:
        """For example "red circle"."""
        return f"{self.colour} {self.kind}"


THINGS = tuple(itertools.starmap(Thing, itertools.product(COLOURS, KINDS)))


@dataclass(frozen=True)
class Actor:
    """One shape in a film: what it is, its centre in the first frame in pixels, how it moves."""

    thing: Thing
    x: float
    y: float
    motion: str = "still"

    def at(self, frame: int) -> Shape:
        """The shape in one frame."""
        across, down = MOTIONS[self.motion]
        way = TRAVEL * frame / (FRAMES - 1)
        return Shape(self.thing.colour, self.thing.kind, self.x + across * way, self.y + down * way, SIZE)


@dataclass(frozen=True)
class Film:
    """One or two shapes through `FRAMES` frames; the first is the one that may move."""

    actors: tuple[Actor, ...]

    @property
    def motion(self) -> str:
        """How the first shape moves."""
        return self.actors[0].motion

    def shapes(self, frame: int) -> list[Shape]:
        """What one frame shows."""
        return [actor.at(frame) for actor in self.actors]

    def frame(self, index: int) -> NDArray[np.uint8]:
        """One frame, u8 `[64, 64, 3]`."""
        return np.asarray(draw(self.shapes(index)))

    def frames(self) -> NDArray[np.uint8]:
        """All of them, u8 `[FRAMES, 64, 64, 3]`; equal ones are drawn once."""
        if self.motion == "still":
            return np.repeat(self.frame(0)[None], FRAMES, axis=0)
        return np.stack([self.frame(index) for index in range(FRAMES)])

    def changed(self, index: int, **fields: object) -> Film:
        """The film with one shape's fields replaced."""
        actors = list(self.actors)
        actors[index] = replace(actors[index], **fields)  # type: ignore[arg-type]  # fields are Actor's own
        return Film(tuple(actors))


def from_words(things: tuple[Thing, ...], motion: str, relation: str | None = None) -> Film:
    """The canonical film: the moving shape's way is centred in its lane, the other stands in the middle of the other lane."""
    across, down = MOTIONS[motion]
    lane = MIDDLE if relation is None else LANES[0] if relation in ("above", "left of") else LANES[1]
    start = MIDDLE - (across + down) * TRAVEL / 2
    x, y = (lane, start) if down else (start, lane)
    first = Actor(things[0], x, y, motion)
    if relation is None:
        return Film((first,))
    other = LANES[1] if lane == LANES[0] else LANES[0]
    x, y = (other, MIDDLE) if down else (MIDDLE, other)
    return Film((first, Actor(things[1], x, y)))


def anywhere(things: tuple[Thing, ...], motion: str, rng: random.Random) -> Film:
    """A film whose shapes stand on any of `PLACES` that leaves room for the motion, up to a jitter; two of them a lane each."""
    across, down = MOTIONS[motion]
    upright = bool(down) if motion != "still" else rng.random() < 0.5
    towards = across + down
    free = [place for place in PLACES if PLACES[0] - TRAVEL / 2 <= place + towards * TRAVEL <= PLACES[2] + TRAVEL / 2]
    lanes = rng.sample(LANES, 2) if len(things) > 1 else [rng.choice(PLACES)]
    actors = []
    for index, (thing, lane) in enumerate(zip(things, lanes, strict=True)):
        along = rng.choice(PLACES if index else free)
        x, y = (lane, along) if upright else (along, lane)
        x, y = (place + rng.uniform(-JITTER, JITTER) for place in (x, y))
        actors.append(Actor(thing, x, y, "still" if index else motion))
    return Film(tuple(actors))


def all_words() -> Iterator[tuple[tuple[Thing, ...], str, str | None]]:
    """Things, motion and relation of every film that words alone can ask for."""
    for thing, motion in itertools.product(THINGS, MOTIONS):
        yield (thing,), motion, None
    for first, second in itertools.permutations(THINGS, 2):
        for motion in DIRECTIONS:
            for relation in RELATIONS[motion]:
                yield (first, second), motion, relation


def reference_shape(thing: Thing, rng: random.Random) -> Shape:
    """A thing as a reference shows it: alone, large, near the middle."""
    x, y = (MIDDLE + rng.uniform(-6, 6) for _ in "xy")
    return Shape(thing.colour, thing.kind, x, y, REFERENCE_SIZE + rng.uniform(-4, 4))
