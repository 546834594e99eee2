"""Frames of any rate, or of none, brought to a steady one: at every moment the frame whose timestamp is nearest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Frame(NamedTuple):
    """A decoded frame uint8 `[h, w, 3]`, shown from `time` until `until` (seconds, exact)."""

    pixels: NDArray[np.uint8]
    time: Fraction
    until: Fraction


def exact(rate: float) -> Fraction:
    """A frame rate as containers write it: 23.976 is 24000/1001."""
    for denominator in (1, 1001):
        fraction = Fraction(round(rate * denominator), denominator)
        if abs(fraction - Fraction(rate)) < Fraction(rate) / 100_000:
            return fraction
    return Fraction(rate).limit_denominator(1000) or Fraction(1, 1000)


def steady(frames: Iterable[NDArray[np.uint8]], rate: Fraction) -> Iterator[Frame]:
    """Frames that came without times, at `rate` frames a second."""
    for index, pixels in enumerate(frames):
        yield Frame(pixels, index / rate, (index + 1) / rate)


def resampled(frames: Iterable[Frame], rate: Fraction) -> Iterator[NDArray[np.uint8]]:
    """Output frame i is the input frame whose timestamp is nearest to i / rate after the first one's; of two, the earlier.

    Output ends with the input: a frame that would begin less than a quarter of a frame before the end (of an output frame
    or of the last input frame, whichever is shorter) is left out, so that timestamps that a container rounded (1 ms in
    WebM, 10 ms in GIF) never add one. At least one comes out.
    Frames are taken in order and one is kept, whatever the length.
    """
    held: Frame | None = None
    start = Fraction(0)
    index = 0
    for frame in frames:
        if held is None:
            start = frame.time
        else:
            middle = (held.time + frame.time) / 2 - start
            while index / rate <= middle:
                yield held.pixels
                index += 1
        held = frame
    if held is None:
        return
    end = held.until - min(held.until - held.time, 1 / rate) / 4 - start
    while index == 0 or index / rate < end:
        yield held.pixels
        index += 1
