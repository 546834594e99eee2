"""Instructions, the pictures they are about, and what must come out: the editing demo's whole world.

A picture has two to four different shapes in a 3 x 3 raster. An instruction names one of them, and what must come out is a
function of the picture and the instruction: the same shapes with the same jitter, but for the one that is named.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from PIL import Image

from examples.shapes.data import COLOURS, KINDS, Shape, draw

RASTER = (11.0, 32.0, 53.0)
"""Columns and rows of the raster, in pixels."""
STEP = 21.0
SIZE = 15.0
PLACE_JITTER = 1.0
SIZE_JITTER = 0.5
COUNTS = (2, 3, 4)

Operation = Literal["recolour", "reshape", "move", "remove"]
OPERATIONS: tuple[Operation, ...] = ("recolour", "reshape", "move", "remove")
ADJECTIVES = {"circle": "round", "square": "square", "triangle": "triangular", "cross": "cruciform"}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Instruction:
    """What to do with the one shape of a picture that has this colour and kind.

    Attributes:
        operation: `recolour` and `reshape` leave it in place, `move` takes it to the next field of the raster.
        value: the new colour, the new kind, the direction; empty for `remove`.
    """

    operation: Operation
    colour: str
    kind: str
    value: str = ""

    @property
    def text(self) -> str:
        """The instruction in words, five of them always."""
        thing = f"the {self.colour} {self.kind}"
        if self.operation == "move":
            return f"move {thing} {self.value}"
        if self.operation == "remove":
            return f"take {thing} away"
        return f"make {thing} {ADJECTIVES.get(self.value, self.value)}"

    @property
    def held_out(self) -> bool:
        """True for the tenth of all instructions that training never sees, of no picture."""
        return hashlib.sha256(self.text.encode()).digest()[0] < 26


class Placed(NamedTuple):
    """A shape in a field (column, row) of the raster."""

    shape: Shape
    field: tuple[int, int]


@dataclass(frozen=True)
class Edit:
    """A picture, by its shapes, and an instruction about one of them."""

    placed: tuple[Placed, ...]
    instruction: Instruction

    @property
    def source(self) -> list[Shape]:
        """The shapes before."""
        return [placed.shape for placed in self.placed]

    @property
    def named(self) -> Placed:
        """The shape that the instruction is about."""
        thing = (self.instruction.colour, self.instruction.kind)
        return next(placed for placed in self.placed if (placed.shape.colour, placed.shape.kind) == thing)

    @property
    def changed(self) -> Placed | None:
        """What becomes of it; None where it is removed."""
        (shape, (column, row)), value = self.named, self.instruction.value
        match self.instruction.operation:
            case "recolour":
                return Placed(shape._replace(colour=value), (column, row))
            case "reshape":
                return Placed(shape._replace(kind=value), (column, row))
            case "move":
                right, down = DIRECTIONS[value]
                moved = shape._replace(x=shape.x + STEP * right, y=shape.y + STEP * down)
                return Placed(moved, (column + right, row + down))
            case "remove":
                return None

    @property
    def kept(self) -> tuple[Placed, ...]:
        """All other shapes."""
        return tuple(placed for placed in self.placed if placed is not self.named)

    @property
    def after(self) -> tuple[Placed, ...]:
        """All shapes afterwards."""
        return (*self.kept, self.changed) if self.changed else self.kept

    @property
    def target(self) -> list[Shape]:
        """The shapes after."""
        return [placed.shape for placed in self.after]

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """Before and after."""
        return draw(self.source), draw(self.target)


@cache
def all_instructions() -> tuple[Instruction, ...]:
    """Every instruction of the grammar, in a fixed order."""
    return tuple(_instructions())


def _instructions() -> Iterator[Instruction]:
    for colour, kind in itertools.product(COLOURS, KINDS):
        yield from (Instruction("recolour", colour, kind, other) for other in COLOURS if other != colour)
        yield from (Instruction("reshape", colour, kind, other) for other in KINDS if other != kind)
        yield from (Instruction("move", colour, kind, direction) for direction in DIRECTIONS)
        yield Instruction("remove", colour, kind)


def split() -> tuple[list[Instruction], list[Instruction]]:
    """All instructions as (training, held out)."""
    instructions = all_instructions()
    return [each for each in instructions if not each.held_out], [each for each in instructions if each.held_out]


def sample(instructions: Sequence[Instruction], count: int, rng: random.Random) -> list[Edit]:
    """`count` pictures, each with one of `instructions`; every operation is as frequent as any other."""
    by_operation = [[each for each in instructions if each.operation == operation] for operation in OPERATIONS]
    return [place(rng.choice(rng.choice(by_operation)), rng) for _ in range(count)]


def place(instruction: Instruction, rng: random.Random) -> Edit:
    """A random picture that `instruction` makes sense of: what it asks for is not there yet, and there is room for it."""
    while True:
        count = rng.choice(COUNTS)
        fields = rng.sample(list(itertools.product(range(3), repeat=2)), count)
        first = (instruction.colour, instruction.kind)
        others = rng.sample([thing for thing in itertools.product(COLOURS, KINDS) if thing != first], count - 1)
        things = [first, *others]
        edit = Edit(
            tuple(Placed(_jittered(*thing, field, rng), field) for thing, field in zip(things, fields, strict=True)),
            instruction,
        )
        if _makes_sense(edit):
            return Edit(tuple(rng.sample(edit.placed, count)), instruction)


def _makes_sense(edit: Edit) -> bool:
    changed = edit.changed
    if changed is None:
        return True
    taken = {placed.field for placed in edit.kept}
    things = {(placed.shape.colour, placed.shape.kind) for placed in edit.kept}
    inside = all(0 <= coordinate < 3 for coordinate in changed.field)
    return inside and changed.field not in taken and (changed.shape.colour, changed.shape.kind) not in things


def _jittered(colour: str, kind: str, field: tuple[int, int], rng: random.Random) -> Shape:
    x, y = (RASTER[place] + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for place in field)
    return Shape(colour, kind, x, y, SIZE + rng.uniform(-SIZE_JITTER, SIZE_JITTER))


SAMPLE = (
    Placed(Shape("red", "circle", 11.6, 31.5, 15.3), (0, 1)),
    Placed(Shape("blue", "square", 52.5, 10.6, 15.0), (2, 0)),
    Placed(Shape("yellow", "triangle", 32.3, 53.4, 15.2), (1, 2)),
)
"""The picture in `input.png`."""
