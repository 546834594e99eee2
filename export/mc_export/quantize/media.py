"""Pictures and clips to calibrate on, where what is asked of a checkpoint comes with some.

Made from numbers, the same ones every time: octaves of smooth noise, each half as strong as the next coarser one. That is about
the spectrum of photographs, and what the checkpoint draws itself would need a picture first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.reference.media import Given
from mc_runtime.media.clip import Clip
from mc_runtime.tasks.registry import TASKS

_COARSEST = 3  # cells along a side
_MOVES = 1 / 16  # of the width, from one frame of a clip to the next


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


def calibration_clip(size: tuple[int, int], frames: int, fps: float, seed: int) -> Clip:
    """A picture that moves to the right and comes back on the left."""
    picture, step = calibration_picture(size, seed), max(1, round(size[1] * _MOVES))
    return Clip(np.stack([np.roll(picture, index * step, axis=1) for index in range(frames)]), fps)


def calibration_media(checkpoint: Checkpoint, frames: int | None, seed: int) -> list[Given]:
    """What one request of each of the checkpoint's tasks gives, those with pictures first; `frames` are pixel frames."""
    tasks = checkpoint.config.tasks if checkpoint.config else checkpoint.backbone.tasks
    size, fps = checkpoint.default_size, checkpoint.defaults.fps
    picture = Image.fromarray(calibration_picture(size, seed))
    given = []
    for task in sorted(tasks, key=lambda name: not TASKS[name].media):
        media = TASKS[task].media
        clip = calibration_clip(size, frames or 1, fps, seed) if "video" in media else None
        given.append(Given(task, (picture,) if "image" in media else (), clip, frames))
    return given
