"""One palette for all frames of a GIF: exact where 256 colours are enough, so that nothing flickers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLOURS = 256
_SAMPLE = 2**18
"""Pixels that a palette is chosen from."""


def paletted(frames: NDArray[np.uint8]) -> list[Image.Image]:
    """Images of mode P with one palette, of frames uint8 `[F, h, w, 3]`: the same pixels if the clip has at most 256 colours,
    else the nearest colours of a median cut over all frames, with error diffusion."""
    colours = _all_colours(frames)
    if colours is None:
        pixels = frames.reshape(-1, 3)
        sample = np.ascontiguousarray(pixels[:: max(1, len(pixels) // _SAMPLE)])
        palette = Image.fromarray(sample[None]).quantize(COLOURS - 1, Image.Quantize.MEDIANCUT, kmeans=1)
        return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    table = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8)
    images = []
    for frame in frames:
        image = Image.fromarray(np.searchsorted(colours, _packed(frame)).astype(np.uint8), "P")
        image.putpalette(table.tobytes())
        images.append(image)
    return images


def _packed(frame: NDArray[np.uint8]) -> NDArray[np.int32]:
    """One number a pixel: `[h, w]`."""
    red, green, blue = (frame[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _all_colours(frames: NDArray[np.uint8]) -> NDArray[np.int32] | None:
    """Every colour of a clip, sorted; None as soon as there are more than 256."""
    found = np.empty(0, np.int32)
    for frame in frames:
        found = np.union1d(found, _packed(frame))
        if len(found) > COLOURS:
            return None
    return found
