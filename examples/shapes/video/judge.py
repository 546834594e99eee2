"""Does a film show what its instruction demands? By properties, and all of them together; without any learned model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from examples.shapes.data import Shape
from examples.shapes.detector import detect
from examples.shapes.video.cases import Case
from examples.shapes.video.world import FRAMES, MOTIONS, SIZE, TRAVEL

PROPERTIES = ("colour", "kind", "motion", "kept", "overall")
DRIFT = 4.0
"""Pixels that a shape may be off: across its way, where it should stand still, and where an input says that it stands."""
UNCHANGED = 6.0
"""Largest mean difference, of 255, between what should stay as it was and what became of it."""
MARGIN = 4
"""Pixels around an edited shape that the edit may touch."""


@dataclass(frozen=True)
class Verdict:
    """One film against its case; `kept` is None where nothing is given that should stay."""

    colour: bool
    """Every frame has the colours asked for, each as often, and no others."""
    kind: bool
    """The same of the kinds of shape."""
    motion: bool
    """From the first frame to the last, what should move goes its way, half of it at the least, and the rest stands still;
    of two shapes from words, each is on its side."""
    kept: bool | None
    """Image to video: the first frame is the picture. Editing: all but the shape that was named is as it was, and that one is
    where it was."""
    overall: bool
    """All of these, and in every frame each colour on its own kind."""


def judge(case: Case, frames: NDArray[np.uint8]) -> Verdict:
    """Reads frames u8 `[FRAMES, 64, 64, 3]` and holds them against `case`. Raises ValueError for another number of frames."""
    if len(frames) != FRAMES:
        raise ValueError(f"a film has {FRAMES} frames, got {len(frames)}")
    seen = [detect(Image.fromarray(frame)) for frame in frames]
    wanted = [actor.thing for actor in case.target.actors]
    right = [Counter((shape.colour, shape.kind) for shape in frame) == Counter(wanted) for frame in seen]
    motion = right[0] and right[-1] and _moves(case, seen)
    kept = _kept(case, frames, seen)
    return Verdict(
        colour=all(Counter(shape.colour for shape in frame) == Counter(thing.colour for thing in wanted) for frame in seen),
        kind=all(Counter(shape.kind for shape in frame) == Counter(thing.kind for thing in wanted) for frame in seen),
        motion=motion,
        kept=kept,
        overall=all(right) and motion and kept is not False,
    )


def _moves(case: Case, seen: Sequence[Sequence[Shape]]) -> bool:
    first, last = ([_find(case, index, frame) for index in range(len(case.target.actors))] for frame in (seen[0], seen[-1]))
    for actor, start, end in zip(case.target.actors, first, last, strict=True):
        across, down = MOTIONS[actor.motion]
        x, y = end.x - start.x, end.y - start.y
        along, off = (x * across + y * down, abs(x * down) + abs(y * across)) if across or down else (TRAVEL, abs(x) + abs(y))
        if along < TRAVEL / 2 or off > DRIFT:
            return False
    return case.task not in ("text-to-video", "in-context-video") or len(first) < 2 or _beside(case, first)


def _find(case: Case, index: int, shapes: Sequence[Shape]) -> Shape:
    """The shape that stands for one of the case's; both are there, and no two are alike."""
    thing = case.target.actors[index].thing
    return next(shape for shape in shapes if (shape.colour, shape.kind) == thing)


def _beside(case: Case, shapes: Sequence[Shape]) -> bool:
    """Whether two shapes are on the sides that the words give them."""
    (a, b), (first, second) = case.target.actors, shapes
    if case.target.motion in ("left", "right"):
        return (a.y < b.y) == (first.y < second.y) and abs(first.y - second.y) > SIZE / 2
    return (a.x < b.x) == (first.x < second.x) and abs(first.x - second.x) > SIZE / 2


def _kept(case: Case, frames: NDArray[np.uint8], seen: Sequence[Sequence[Shape]]) -> bool | None:
    if case.picture is not None and case.task == "image-to-video":
        same = _difference(frames[:1], np.asarray(case.picture)[None]) <= UNCHANGED
        return same and _in_place(case.target.shapes(0), seen[0])
    clip = case.clip
    if case.source is None or clip is None or case.edited is None:
        return None
    index, _ = case.edited
    free = np.ones(frames.shape[:3], bool)
    for number, mask in enumerate(free):
        shape = case.source.shapes(number)[index]
        reach = SIZE / 2 + MARGIN
        top, left = (max(0, round(place - reach)) for place in (shape.y, shape.x))
        mask[top : round(shape.y + reach), left : round(shape.x + reach)] = False
    placed = all(_in_place(case.target.shapes(number), shapes) for number, shapes in enumerate(seen))
    return placed and _difference(frames[free], clip[free]) <= UNCHANGED


def _in_place(wanted: Sequence[Shape], seen: Sequence[Shape]) -> bool:
    """Whether where every wanted shape is, one is seen, whatever it is."""
    near = [any(abs(a.x - b.x) <= DRIFT and abs(a.y - b.y) <= DRIFT for b in seen) for a in wanted]
    return all(near) and len(seen) == len(wanted)


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The share of films that are right, by property; `kept` counts only cases that have something to keep."""
    rows = [asdict(verdict) for verdict in verdicts]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in PROPERTIES}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}
