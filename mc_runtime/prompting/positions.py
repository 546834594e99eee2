"""Multimodal RoPE positions (t, h, w), identical to transformers' `Qwen2_5_VLModel.get_rope_index`.

Text counts 0, 1, 2 on all three axes. A vision grid, and so a canvas, starts at the next position on each axis and advances
along its own; what follows it starts after its longer side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Vision tokens (t, h, w), counted after spatial merging.

    Attributes:
        interval: positions between two frames: 1 for a still image, `tokens_per_second * second_per_grid` for a video.
    """

    t: int
    h: int
    w: int
    interval: float = 1.0

    @property
    def tokens(self) -> int:
        return self.t * self.h * self.w

    @property
    def span(self) -> int:
        """How far the next text starts after the grid does; frames do not count (as in transformers)."""
        return max(self.h, self.w)

    def positions(self, start: int) -> Positions:
        """i64 `[3, t, h, w]`."""
        # float32, then truncated: what transformers' integer arange times a float gives.
        frames = (np.arange(self.t, dtype=np.float32) * np.float32(self.interval)).astype(np.int64)
        axes = np.meshgrid(frames, np.arange(self.h), np.arange(self.w), indexing="ij")
        return np.stack(axes).astype(np.int64) + start


def canvas_positions(starts: ArrayLike, grid: Grid) -> Positions:
    """i64 `[3, B, t, h, w]` of one canvas behind each instruction; `starts` are the next free positions `[B]`.

    After text alone that is its length, end token included.
    """
    return np.stack([grid.positions(int(start)) for start in np.asarray(starts)], axis=1)


def sequence_positions(parts: Sequence[int | Grid]) -> tuple[Positions, int]:
    """Positions of one sequence of text runs (an int, their length) and vision grids, and the next free position.

    Returns:
        i64 `[3, n]`, and where a canvas behind the sequence starts.
    """
    start, pieces = 0, [np.empty((3, 0), dtype=np.int64)]
    for part in parts:
        if isinstance(part, Grid):
            pieces.append(part.positions(start).reshape(3, -1))
            start += part.span
        else:
            pieces.append(np.broadcast_to(np.arange(start, start + part), (3, part)))
            start += part
    return np.concatenate(pieces, axis=1), start
