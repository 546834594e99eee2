"""A clip whose frames can be told apart through any codec, and a file of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mc_runtime.media import Clip, save_clip

METADATA = {"prompt": 'a "red" circle, 猫', "seed": 7, "size": [32, 48]}


def moving(count: int = 9, height: int = 32, width: int = 48, fps: float = 24) -> Clip:
    """Frame i is a grey of its own with a red left part: `level` reads i back through any codec."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (20 + 12 * np.arange(count) % 230)[:, None, None, None]
    frames[:, :, : width // 4] = (200, 20, 20)
    return Clip(frames, fps)


def numbers(clip: Clip) -> list[int]:
    """Which frame of `moving` each one is."""
    return [round((float(frame[:, -10:].mean()) - 20) / 12) for frame in clip.frames]


def written(folder: Path, suffix: str, clip: Clip | None = None, **options: Any) -> Path:
    path = folder / f"clip{suffix}"
    save_clip(clip or moving(), path, **options)
    return path
