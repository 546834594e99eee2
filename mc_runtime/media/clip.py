"""A clip on the host: frames of one size at a steady rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.media.images import pixels_to_bytes


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames uint8 `[F, h, w, 3]`, RGB, at `fps` frames a second."""

    frames: NDArray[np.uint8]
    fps: float

    def __post_init__(self) -> None:
        if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3 or not self.frames.size:
            raise ValueError(f"frames are uint8 [F, h, w, 3], got {self.frames.dtype} {list(self.frames.shape)}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps is a positive number, got {self.fps}")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self) / self.fps

    @property
    def images(self) -> list[Image.Image]:
        """The frames as RGB images."""
        return [Image.fromarray(frame) for frame in self.frames]

    @property
    def pixels(self) -> NDArray[np.float32]:
        """The frames as f32 `[1, F, h, w, 3]` in [0, 1]."""
        return (self.frames.astype(np.float32) / np.float32(255))[None]

    @classmethod
    def of_images(cls, images: Sequence[Image.Image], fps: float) -> Clip:
        """RGB images of one size, one a frame. Raises ValueError where their sizes differ."""
        return cls(np.stack([np.asarray(image) for image in images]), fps)


def pixels_to_clips(pixels: NDArray[Any], fps: float) -> list[Clip]:
    """Clips of decoded `pixels` f32 `[B, F, h, w, 3]` in [0, 1]. Raises EngineError where one is not finite."""
    return [Clip(pixels_to_bytes(frames), fps) for frames in pixels]
