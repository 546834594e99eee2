"""Pictures and clips to calibrate on, where what is asked of a checkpoint comes with some.

Made from numbers, the same ones every time: what the checkpoint draws itself would need a picture first. There are two kinds:
octaves of smooth noise, each half as strong as the next coarser one, which is about the spectrum of photographs; and
posters, flat shapes in pure colours with hard edges, which are what drawings, signs and screens are made of. What lies beyond a
calibrated range is cut off, so ranges have to be of both (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.reference.media import Given
from mc_runtime.media.clip import Clip
from mc_runtime.tasks.registry import TASKS

_COARSEST = 3  # cells along a side
_MOVES = 1 / 16  # of the width, from one frame of a clip to the next
_SHAPES = 8  # on a poster
_LEVELS = (0, 0, 128, 255, 255)  # of a poster's channels: mostly pure colours

Draw = Callable[[tuple[int, int], int], NDArray[np.uint8]]
"""A picture `[h, w, 3]` of (height, width) pixels from a seed."""


def calibration_picture(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """A picture `[h, w, 3]` of (height, width) pixels, all values from 0 to 255 in each channel."""
    height, width = size
    generator = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    cells, strength = _COARSEST, 1.0
    while cells < max(size):
        for channel in range(3):
            octave = Image.fromarray(generator.standard_normal((cells, cells), dtype=np.float32))
            picture[..., channel] += strength * np.asarray(octave.resize((width, height), Image.Resampling.BICUBIC))
        cells, strength = 2 * cells, strength / 2
    low, high = picture.min(axis=(0, 1)), picture.max(axis=(0, 1))
    return np.round((picture - low) / np.maximum(high - low, 1e-6) * 255).astype(np.uint8)


def calibration_poster(size: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """A picture `[h, w, 3]` of (height, width) pixels: rectangles and ellipses of one colour each on a ground of another."""
    height, width = size
    generator = np.random.default_rng(seed)

    def colour() -> tuple[int, int, int]:
        red, green, blue = generator.choice(_LEVELS, 3)
        return int(red), int(green), int(blue)

    poster = Image.new("RGB", (width, height), colour())
    pen = ImageDraw.Draw(poster)
    for index in range(_SHAPES):
        top, left = (int(generator.integers(side)) for side in size)
        bottom, right = (start + int(side * generator.uniform(1 / 8, 1 / 2)) for start, side in ((top, height), (left, width)))
        (pen.rectangle if index % 2 else pen.ellipse)((left, top, right, bottom), fill=colour())
    return np.asarray(poster)


PICTURES: tuple[Draw, ...] = (calibration_picture, calibration_poster)
"""The kinds; who needs several pictures takes them in turn."""


def calibration_clip(size: tuple[int, int], frames: int, fps: float, seed: int, draw: Draw = calibration_picture) -> Clip:
    """A picture that moves to the right and comes back on the left."""
    picture, step = draw(size, seed), max(1, round(size[1] * _MOVES))
    return Clip(np.stack([np.roll(picture, index * step, axis=1) for index in range(frames)]), fps)


def calibration_media(checkpoint: Checkpoint, frames: int | None, seed: int, draw: Draw = calibration_picture) -> list[Given]:
    """What one request of each of the checkpoint's tasks gives, those with pictures first; `frames` are pixel frames."""
    tasks = checkpoint.config.tasks if checkpoint.config else checkpoint.backbone.tasks
    size, fps = checkpoint.default_size, checkpoint.defaults.fps
    picture = Image.fromarray(draw(size, seed))
    given = []
    for task in sorted(tasks, key=lambda name: not TASKS[name].media):
        media = TASKS[task].media
        clip = calibration_clip(size, frames or 1, fps, seed, draw) if "video" in media else None
        given.append(Given(task, (picture,) if "image" in media else (), clip, frames))
    return given
