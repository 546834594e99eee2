"""Has a picture been edited as the instruction says, and nothing else in it? Read by the detector, without any learned model.

The picture that should have come out is drawn and read too: places and sizes are compared as the detector sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from examples.shapes.data import Shape, draw
from examples.shapes.detector import detect
from examples.shapes.edit.data import Edit

PLACE_TOLERANCE = 2.5
"""Pixels by which a shape's centre may be off, along x and y."""
SIZE_TOLERANCE = 3.0
"""Pixels by which its size may be."""
MARGIN = 4
"""Pixels around what the instruction changes that do not count as untouched."""


@dataclass(frozen=True)
class Verdict:
    """One edited picture against its instruction."""

    done: bool
    """The named shape has become what it should: there, of that colour, kind and size; or it is gone."""
    kept: bool
    """Every other shape has its colour, kind, place and size."""
    nothing_else: bool
    """No more shapes than there should be."""
    drift: float
    """Mean absolute difference from the original, of 255, over the pixels that the instruction does not touch."""

    @property
    def correct(self) -> bool:
        """All of it."""
        return self.done and self.kept and self.nothing_else


def judge(edit: Edit, picture: Image.Image) -> Verdict:
    """Reads `picture`, which was made of `edit`'s, and holds it against what should have come out."""
    seen = detect(picture)
    kept = detect(draw([placed.shape for placed in edit.kept]))
    changed = detect(draw([edit.changed.shape])) if edit.changed else []
    others = [shape for shape in seen if not any(_same(shape, other) for other in kept)]
    done = all(any(_same(shape, found) for found in others) for shape in changed)
    if not changed:  # what should be gone is: no shape of any kind stands there
        done = not any(_near(edit.named.shape, shape) for shape in seen)
    return Verdict(
        done=done,
        kept=all(any(_same(shape, found) for found in seen) for shape in kept),
        nothing_else=len(seen) <= len(kept) + len(changed),
        drift=_drift(edit, picture),
    )


def _near(wanted: Shape, found: Shape) -> bool:
    return max(abs(wanted.x - found.x), abs(wanted.y - found.y)) <= PLACE_TOLERANCE


def _same(wanted: Shape, found: Shape) -> bool:
    alike = (wanted.colour, wanted.kind) == (found.colour, found.kind)
    return alike and _near(wanted, found) and abs(wanted.size - found.size) <= SIZE_TOLERANCE


def _drift(edit: Edit, picture: Image.Image) -> float:
    before = np.asarray(draw(edit.source), np.float32)
    touched = np.zeros(before.shape[:2], bool)
    for shape in (edit.named.shape, *([edit.changed.shape] if edit.changed else [])):
        touched |= _box(shape, touched.shape)
    return float(np.abs(np.asarray(picture.convert("RGB"), np.float32) - before)[~touched].mean())


def _box(shape: Shape, size: Sequence[int]) -> np.ndarray:
    rows, columns = np.indices(size) + 0.5
    reach = 0.55 * shape.size + MARGIN
    return (abs(columns - shape.x) <= reach) & (abs(rows - shape.y) <= reach)
