"""Reads a picture back into shapes, without any learning: segment, name the colour, fit the outline.

Strict on purpose: a blob whose colour or outline fits nothing is reported as `UNKNOWN`, and fails the caption it came from.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from examples.shapes.data import BACKGROUND, COLOURS, KINDS, OVERSAMPLING, PALETTE, SIDE, Shape, outline

UNKNOWN = "unknown"

FOREGROUND_DISTANCE = 60.0
"""RGB distance from the background above which a pixel belongs to a shape."""
SMALLEST_BLOB = 12
"""Blobs with fewer pixels are specks, not shapes."""
COLOUR_DISTANCE = 60.0
"""Largest RGB distance of a blob's median colour from the palette's."""
OUTLINE_OVERLAP = 0.72
"""Smallest intersection over union of a blob with a kind's outline."""


def detect(picture: Image.Image) -> list[Shape]:
    """The shapes in `picture` (RGB, `SIDE` pixels square), in reading order of their first pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(
            f"the detector reads {SIDE} x {SIDE} pictures, got {pixels.shape[1]} x {pixels.shape[0]}: resize it first"
        )
    foreground = np.linalg.norm(pixels - BACKGROUND, axis=-1) > FOREGROUND_DISTANCE
    return [_describe(pixels, blob) for blob in _blobs(foreground)]


def _blobs(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The 4-connected parts of `mask` that are no specks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        neighbours = np.stack([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
        spread = np.where(mask, neighbours.max(axis=0), 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    parts = [labels == label for label in dict.fromkeys(labels[labels > 0].tolist())]
    return [part for part in parts if part.sum() >= SMALLEST_BLOB]


def _describe(pixels: NDArray[np.float32], blob: NDArray[np.bool_]) -> Shape:
    kind, x, y, size = _fit_outline(blob)
    return Shape(_name_colour(pixels[blob]), kind, x, y, size)


def _name_colour(pixels: NDArray[np.float32]) -> str:
    """The palette's name of the blob's median colour."""
    distances = np.linalg.norm(np.array(list(PALETTE.values())) - np.median(pixels, axis=0), axis=-1)
    return COLOURS[int(distances.argmin())] if distances.min() < COLOUR_DISTANCE else UNKNOWN


def _fit_outline(blob: NDArray[np.bool_]) -> tuple[str, float, float, float]:
    """(kind, x, y, size) of the outline that covers `blob` best, each kind drawn with the blob's own box."""
    rows, columns = np.nonzero(blob)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    x, y = (left + right) / 2, (top + bottom) / 2
    size = max(right - left, bottom - top)
    fits = {kind: _overlap(blob[top:bottom, left:right], kind) for kind in KINDS}
    best = max(fits, key=fits.__getitem__)
    lopsided = min(right - left, bottom - top) < 0.7 * size
    kind = UNKNOWN if lopsided or fits[best] < OUTLINE_OVERLAP else best
    return kind, float(x), float(y), float(size)


def _overlap(crop: NDArray[np.bool_], kind: str) -> float:
    """Intersection over union of a cropped blob and `kind` drawn into the same box."""
    template = _template(kind, *crop.shape)
    return float((crop & template).sum() / (crop | template).sum())


@cache
def _template(kind: str, height: int, width: int) -> NDArray[np.bool_]:
    """`kind` stretched to fill a box of `height` x `width` pixels."""
    polygons = outline(Shape(COLOURS[0], kind, 0, 0, 1))
    points = np.array([point for polygon in polygons for point in polygon])
    low, high = points.min(axis=0), points.max(axis=0)
    scale = np.array([width, height]) * OVERSAMPLING / (high - low)
    image = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    pen = ImageDraw.Draw(image)
    for polygon in polygons:
        pen.polygon([tuple((np.array(point) - low) * scale) for point in polygon], fill=255)
    return np.asarray(image.reduce(OVERSAMPLING)) > 100
