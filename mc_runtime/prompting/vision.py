"""What the `vision` engine is given: the patches of pictures and clips, and which of them attend to which.

Qwen2.5-VL's tower attends within a frame in some blocks and within windows of it in the others. Both are lists of patches,
filled up to one length: the engine gathers rows by them and puts its results back, whatever the grids are. Patches keep the
order of the token sequence, so nothing is permuted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import RequestError
from mc_runtime.prompting.pixels import Frames, Media, clip_frames, patches, picture_frames
from mc_runtime.prompting.positions import Grid


@dataclass(frozen=True, eq=False)
class Seen:
    """One picture or clip, resized and counted, as the planner will see it.

    Attributes:
        frames: u8 `[F, h, w, 3]`.
        grid: its tokens (t, h, w), with the temporal positions of a clip.
        is_clip: whether it moves.
    """

    frames: Frames
    grid: Grid
    is_clip: bool

    @cached_property
    def digest(self) -> str:
        """What it shows and how it is cut, in one word. The interval between frames does not matter to the tower."""
        head = f"{self.grid.t} {self.grid.h} {self.grid.w}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(self.frames).data).hexdigest()


def look_at(media: Sequence[Media], spec: Vision) -> tuple[Seen, ...]:
    """Resizes pictures and clips and counts their tokens.

    Raises:
        RequestError: they are too many, or of too many tokens together, or one is no picture; the message says the mend.
    """
    if len(media) > spec.max_media:
        raise RequestError(f"{len(media)} pictures and clips are given, the limit is {spec.max_media}; leave some out")
    seen = tuple(_seen(one, spec) for one in media)
    tokens = sum(one.grid.tokens for one in seen)
    if tokens > spec.max_tokens:
        raise RequestError(
            f"the pictures and clips take {tokens} tokens, the limit is {spec.max_tokens}; "
            "give fewer, smaller or shorter ones, or build the bundle with a larger prompt.max_vision_tokens"
        )
    return seen


def _seen(media: Media, spec: Vision) -> Seen:
    from mc_runtime.media.clip import Clip

    interval, is_clip = 1.0, isinstance(media, Clip)
    if isinstance(media, Clip):
        frames, seconds = clip_frames(media, spec)
        interval = float(np.float32(spec.tokens_per_second) * np.float32(seconds))
    else:
        frames = picture_frames(media, spec)
    times = -(-len(frames) // spec.temporal_patch)
    grid = Grid(times, frames.shape[1] // spec.factor, frames.shape[2] // spec.factor, interval)
    return Seen(frames, grid, is_clip)


def tower_inputs(seen: Sequence[Seen], spec: Vision) -> dict[str, NDArray[Any]]:
    """The inputs of the `vision` engine for pictures and clips, in the order of their tokens; see :func:`tower_indices`."""
    pixels = np.concatenate([patches(one.frames, spec) for one in seen])
    return {"pixels": pixels, **tower_indices([one.grid for one in seen], spec)}


def tower_indices(grids: Sequence[Grid], spec: Vision) -> dict[str, NDArray[np.int64]]:
    """Positions and attention of the tower for token grids.

    Returns:
        `positions` i64 `[n, p, 2]`: row and column of every patch in its frame, p patches a token.
        `windows` i64 `[V, P]`: the patches of every window, -1 where it ends; `window_places` i64 `[n, p]`: where in `windows`,
        flattened, each patch is.
        `frames`, `frame_places`: the same for whole frames.
    """
    window, unit = spec.window_tokens, spec.patches_per_token
    tokens = sum(grid.tokens for grid in grids)
    windows = list(_windows(grids, window))
    frames = list(_windows(grids, None))
    return {
        "positions": np.concatenate([_positions(grid, spec.merge) for grid in grids]),
        **_lists("window", windows, tokens, unit, window * window),
        **_lists("frame", frames, tokens, unit, max(map(len, frames))),
    }


def _positions(grid: Grid, merge: int) -> NDArray[np.int64]:
    rows = np.arange(grid.h * merge).reshape(grid.h, 1, merge, 1)
    columns = np.arange(grid.w * merge).reshape(1, grid.w, 1, merge)
    both = np.stack(np.broadcast_arrays(rows, columns), axis=-1).reshape(grid.h * grid.w, merge**2, 2)
    return np.tile(both, (grid.t, 1, 1)).astype(np.int64)


def _windows(grids: Sequence[Grid], side: int | None) -> Iterator[NDArray[np.int64]]:
    """The tokens of every window of `side` x `side`, smaller at the right and lower borders; or of every frame."""
    start = 0
    for grid in grids:
        numbers = np.arange(start, start + grid.tokens).reshape(grid.t, grid.h, grid.w)
        start += grid.tokens
        high, wide = (side, side) if side else (grid.h, grid.w)
        for frame in numbers:
            for top in range(0, grid.h, high):
                for left in range(0, grid.w, wide):
                    yield frame[top : top + high, left : left + wide].reshape(-1)


def _lists(name: str, groups: Sequence[NDArray[np.int64]], tokens: int, unit: int, width: int) -> dict[str, NDArray[np.int64]]:
    """Groups of tokens as patches, `[groups, width * unit]`, and every patch's place in them."""
    places = np.empty((tokens, unit), np.int64)
    members = np.full((len(groups), width * unit), -1, np.int64)
    each = np.arange(unit)
    for index, group in enumerate(groups):
        members[index, : len(group) * unit] = (group[:, None] * unit + each).reshape(-1)
        places[group] = index * width * unit + np.arange(len(group) * unit).reshape(-1, unit)
    return {f"{name}s": members, f"{name}_places": places}
