"""Captions and the pictures they ask for: the demo's whole world.

A `Scene` is what a caption demands. It is the one place where the grammar lives: `Scene.caption` writes it, `parse` reads it,
`draw` renders it and `judge.py` holds a picture against it. Layout is a function of the scene (canonical slots), up to a small
jitter of place and size.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin
from typing import NamedTuple

from PIL import Image, ImageDraw

SIDE = 64
"""Width and height of a picture in pixels."""

BACKGROUND = (244, 241, 234)
PALETTE = {
    "red": (214, 46, 46),
    "green": (46, 160, 67),
    "blue": (44, 92, 214),
    "yellow": (242, 196, 20),
    "purple": (150, 60, 180),
    "black": (36, 36, 40),
}
COLOURS = tuple(PALETTE)
KINDS = ("circle", "square", "triangle", "cross")
NUMBERS = ("a", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
CORNERS = {"top left": (16, 16), "top right": (48, 16), "bottom left": (16, 48), "bottom right": (48, 48)}

PLACE_JITTER = 1.25
SIZE_JITTER = 0.75
OVERSAMPLING = 4

_LONE_SLOTS = {
    1: ((32, 32),),
    2: ((18, 32), (46, 32)),
    3: ((32, 18), (18, 46), (46, 46)),
    4: ((18, 18), (46, 18), (18, 46), (46, 46)),
}
_LONE_SIZE = {1: 26, 2: 21, 3: 21, 4: 21}
_ROW = {1: (32,), 2: (17, 47), 3: (12, 32, 52)}
_ROW_SIZE = {1: 22, 2: 20, 3: 15}
_HALVES = (17, 47)


class Shape(NamedTuple):
    """One shape in a picture; centre and size in pixels."""

    colour: str
    kind: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Group:
    """`count` equal shapes."""

    count: int
    colour: str
    kind: str

    @property
    def phrase(self) -> str:
        """The group in words: "a red circle", "two blue squares", "three black crosses"."""
        plural = "" if self.count == 1 else "es" if self.kind.endswith("s") else "s"
        return f"{NUMBERS[self.count - 1]} {self.colour} {self.kind}{plural}"


@dataclass(frozen=True)
class Scene:
    """What one caption demands: one group, perhaps in a corner, or two groups and a relation between them."""

    groups: tuple[Group, ...]
    relation: str | None = None
    corner: str | None = None

    @property
    def caption(self) -> str:
        """The scene in words."""
        first = self.groups[0].phrase
        if self.relation:
            return f"{first} {self.relation} {self.groups[1].phrase}"
        if self.corner:
            return f"{first} in the {self.corner} corner"
        return first

    @property
    def held_out(self) -> bool:
        """True for the tenth of all captions that training never sees."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 26

    def slots(self) -> list[Shape]:
        """The canonical place and size of every shape."""
        if self.relation is None:
            (group,) = self.groups
            places = (CORNERS[self.corner],) if self.corner else _LONE_SLOTS[group.count]
            size = 21 if self.corner else _LONE_SIZE[group.count]
            return [Shape(group.colour, group.kind, x, y, size) for x, y in places]
        halves = _HALVES if self.relation in ("left of", "above") else _HALVES[::-1]
        side_by_side = self.relation in ("left of", "right of")
        shapes = []
        for group, half in zip(self.groups, halves, strict=True):
            for along in _ROW[group.count]:
                x, y = (half, along) if side_by_side else (along, half)
                shapes.append(Shape(group.colour, group.kind, x, y, _ROW_SIZE[group.count]))
        return shapes


def all_scenes() -> Iterator[Scene]:
    """Every scene of the grammar, one to four shapes, in a fixed order."""
    things = list(itertools.product(COLOURS, KINDS))
    for count, (colour, kind) in itertools.product((1, 2, 3, 4), things):
        yield Scene((Group(count, colour, kind),))
    for corner, (colour, kind) in itertools.product(CORNERS, things):
        yield Scene((Group(1, colour, kind),), corner=corner)
    for relation, first, second in itertools.product(RELATIONS, things, things):
        if first == second:
            continue
        for m, n in itertools.product((1, 2, 3), repeat=2):
            if m + n <= 4:
                yield Scene((Group(m, *first), Group(n, *second)), relation=relation)


@cache
def _by_caption() -> dict[str, Scene]:
    return {scene.caption: scene for scene in all_scenes()}


def parse(caption: str) -> Scene:
    """The scene that `caption` demands; `ValueError` if the grammar has no such caption."""
    try:
        return _by_caption()[caption]
    except KeyError:
        raise ValueError(
            f"not a caption of this grammar: {caption!r}; it says for example 'two red circles left of a blue square'"
        ) from None


def split() -> tuple[list[Scene], list[Scene]]:
    """All scenes as (training, held out)."""
    scenes = list(all_scenes())
    return [s for s in scenes if not s.held_out], [s for s in scenes if s.held_out]


def sample(scenes: Sequence[Scene], count: int, rng: random.Random) -> list[Scene]:
    """`count` scenes of `scenes`; the few without a relation come up a third of the time, so that they are learned too."""
    lone = [scene for scene in scenes if scene.relation is None]
    related = [scene for scene in scenes if scene.relation is not None]
    return [rng.choice(lone if rng.random() < 1 / 3 else related) for _ in range(count)]


def place(scene: Scene, rng: random.Random) -> list[Shape]:
    """The scene's shapes, jittered."""
    return [
        shape._replace(
            x=shape.x + rng.uniform(-PLACE_JITTER, PLACE_JITTER),
            y=shape.y + rng.uniform(-PLACE_JITTER, PLACE_JITTER),
            size=shape.size + rng.uniform(-SIZE_JITTER, SIZE_JITTER),
        )
        for shape in scene.slots()
    ]


def draw(shapes: Sequence[Shape]) -> Image.Image:
    """An antialiased RGB picture of `shapes`, `SIDE` pixels square."""
    big = Image.new("RGB", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), BACKGROUND)
    pen = ImageDraw.Draw(big)
    for shape in shapes:
        for polygon in outline(shape):
            points = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in polygon]
            pen.polygon(points, fill=PALETTE[shape.colour])
    return big.reduce(OVERSAMPLING)


def outline(shape: Shape) -> list[list[tuple[float, float]]]:
    """The polygons that fill `shape`, in pixels."""
    unit = _UNIT_OUTLINES[shape.kind]
    return [[(shape.x + x * shape.size, shape.y + y * shape.size) for x, y in polygon] for polygon in unit]


def _box(width: float, height: float) -> list[tuple[float, float]]:
    return [(-width / 2, -height / 2), (width / 2, -height / 2), (width / 2, height / 2), (-width / 2, height / 2)]


def _disc(corners: int = 48) -> list[tuple[float, float]]:
    return [(cos(2 * pi * i / corners) / 2, sin(2 * pi * i / corners) / 2) for i in range(corners)]


_UNIT_OUTLINES: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_disc()],
    "square": [_box(0.9, 0.9)],
    "triangle": [[(0, -0.5), (0.54, 0.42), (-0.54, 0.42)]],
    "cross": [_box(1, 0.34), _box(0.34, 1)],
}
