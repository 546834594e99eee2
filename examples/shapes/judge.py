"""Does a picture show what its caption demands? In the manner of GenEval: by properties, and all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from PIL import Image

from examples.shapes.data import CORNERS, SIDE, Group, Scene, Shape
from examples.shapes.detector import detect

PROPERTIES = ("colour", "kind", "count", "binding", "position", "overall")


@dataclass(frozen=True)
class Verdict:
    """One picture against its caption; `position` is None where the caption says nothing of it."""

    colour: bool
    """The colours seen are the colours asked for, no more and no fewer."""
    kind: bool
    """The same of the kinds of shape."""
    count: bool
    """As many shapes as asked for."""
    binding: bool
    """Every colour sits on the kind it was asked for with."""
    position: bool | None
    """All shapes of the first group stand where the caption says, relative to all of the second or to the picture."""
    overall: bool
    """Exactly the shapes asked for, so many of each, in the right place."""


def judge(scene: Scene, picture: Image.Image) -> Verdict:
    """Reads `picture` and holds it against `scene`."""
    seen = detect(picture)
    wanted = Counter({(group.colour, group.kind): group.count for group in scene.groups})
    found = Counter((shape.colour, shape.kind) for shape in seen)
    position = _position(scene, seen)
    return Verdict(
        colour={colour for colour, _ in wanted} == {colour for colour, _ in found},
        kind={kind for _, kind in wanted} == {kind for _, kind in found},
        count=wanted.total() == found.total(),
        binding=wanted.keys() == found.keys(),
        position=position,
        overall=wanted == found and position is not False,
    )


def _position(scene: Scene, seen: Sequence[Shape]) -> bool | None:
    if scene.corner:
        x, y = CORNERS[scene.corner]
        shapes = _members(scene.groups[0], seen)
        return bool(shapes) and all((s.x < SIDE / 2) == (x < SIDE / 2) and (s.y < SIDE / 2) == (y < SIDE / 2) for s in shapes)
    if scene.relation is None:
        return None
    first, second = (_members(group, seen) for group in scene.groups)
    if not first or not second:
        return False
    if scene.relation in ("right of", "below"):
        first, second = second, first
    if scene.relation in ("left of", "right of"):
        return max(s.x for s in first) < min(s.x for s in second)
    return max(s.y for s in first) < min(s.y for s in second)


def _members(group: Group, seen: Sequence[Shape]) -> list[Shape]:
    return [shape for shape in seen if (shape.colour, shape.kind) == (group.colour, group.kind)]


def shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The share of pictures that are right, by property; `position` counts only captions that ask for one."""
    rows = [asdict(verdict) for verdict in verdicts]
    columns = {name: [row[name] for row in rows if row[name] is not None] for name in PROPERTIES}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}
