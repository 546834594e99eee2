"""What an edit changed, as a moving picture: the input beside the output."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.media.clip import Clip
from mc_runtime.media.fit import resized

GAP = 8
STILL_FPS = 12.0
"""Frames a second of a comparison of two pictures."""
HOLD, SWEEP = 6, 18
"""Frames that it rests, and that it takes from the input to the output."""
_LINE = (255, 255, 255)


def comparison(before: Image.Image | Clip, after: Image.Image | Clip) -> Clip:
    """The input on the left and the output on the right, in one clip to save with `save_clip`.

    Two clips run side by side at the output's rate, the input by the nearest earlier frame; the shorter one rests on its
    last frame. With a picture as the output, the right side shows the input first and a line sweeps the output over it,
    rests, and sweeps back, so that the eye sees what changed; the last frames lead to the first. The input is resized to
    the output's size.
    """
    if isinstance(after, Image.Image):
        first = before if isinstance(before, Image.Image) else before.images[0]
        return _swept(_sized(first, after.convert("RGB")), np.asarray(after.convert("RGB")))
    if isinstance(before, Image.Image):
        before = Clip.of_images([before.convert("RGB")], after.fps)
    count = max(len(after), round(len(before) * after.fps / before.fps))
    shape = after.images[0]
    frames = []
    for index in range(count):
        left = before.frames[min(int(index * before.fps / after.fps + 1e-6), len(before) - 1)]
        frames.append(_beside(_sized(Image.fromarray(left), shape), after.frames[min(index, len(after) - 1)]))
    return Clip(np.stack(frames), after.fps)


def _swept(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Clip:
    return Clip(np.stack([_beside(before, right) for right in _sweep(before, after)]), STILL_FPS)


def _sweep(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """From `before` to `after` and back."""
    width = before.shape[1]
    shares = [0.0] * HOLD + [step / SWEEP for step in range(1, SWEEP)] + [1.0] * (2 * HOLD)
    shares += [1 - step / SWEEP for step in range(1, SWEEP)]
    for share in shares:
        column = round(share * width)
        frame = before.copy()
        frame[:, :column] = after[:, :column]
        if 0 < share < 1:
            frame[:, max(0, column - 1) : column + 1] = _LINE
        yield frame


def _sized(image: Image.Image, like: Image.Image) -> NDArray[np.uint8]:
    image = image.convert("RGB")
    return np.asarray(image if image.size == like.size else resized(image, (like.height, like.width)))


def _beside(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gap = np.full((left.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)
