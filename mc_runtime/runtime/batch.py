"""Images side by side: the inputs of the step engine for one batch, and their shapes before they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mc_runtime.backends.base import Array, Shapes
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.errors import EngineError
from mc_runtime.runtime.engines import fixed, padded
from mc_runtime.runtime.plan import Branch

# Context rows are padded to a multiple of this, so that an engine that is compiled for the shapes it meets, meets
# few. Masked rows have no weight.
_CONTEXT_ROWS = 32


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one run of the step engine works on: B images, G guidance branches.

    Attributes:
        sample: f32 `[B, C, H, W]`, the noise, scaled as the sampler wants it.
        history: f32 `[B, K, C, H, W]`, zeros; None where the sampler looks at one sample only.
        constant: what no step changes: `guidance` f32 `[B, G]`, `context` f32 `[B, G, L, D_ctx]`, `context_mask` i64
            `[B, G, L]` and, for MetaCanvas, `canvas` f32 `[B, G, t, h, w, D_b]`.
        images: how many of the B images are asked for; the rest fill up an engine of a fixed batch.
    """

    sample: Array
    history: Array | None
    constant: Mapping[str, Array]
    images: int


def step_batch(spec: EngineSpec, noise: Array, branches: Sequence[Sequence[Branch]], weights: Sequence[float]) -> StepBatch:
    """Put images into one batch.

    Dimensions that the engine has fixed are filled up: rows and branches without weight, images by repeating the last.

    Args:
        spec: of the step engine.
        noise: f32 `[images, C, H, W]`.
        branches: for every image, as many branches as there are weights.
        weights: of the branches, the same for every image.
    """
    images = len(noise)
    longest = max(len(branch.context) for image in branches for branch in image)
    count, branch_count, length = _extents(spec, images, len(weights), longest)
    rows = [[*image, *[image[0]] * (branch_count - len(image))] for image in branches]
    rows += [rows[-1]] * (count - images)
    sample = np.concatenate([noise, *[noise[-1:]] * (count - images)])
    constant = {
        "guidance": np.tile(padded(np.array(weights, np.float32), 0, branch_count), (count, 1)),
        "context": _stacked([[padded(branch.context, 0, length) for branch in image] for image in rows]),
        "context_mask": _stacked([[padded(branch.context_mask, 0, length) for branch in image] for image in rows]),
    }
    canvases = [[branch.canvas for branch in image if branch.canvas is not None] for image in rows]
    if spec.input("canvas"):
        constant["canvas"] = _stacked(canvases)
    kept = fixed(spec, "history", 1)
    history = np.zeros((count, kept, *sample.shape[1:]), np.float32) if kept else None
    return StepBatch(sample, history, constant, images)


def step_shapes(
    spec: EngineSpec,
    *,
    images: int,
    branches: int,
    longest: int,
    latent: tuple[int, ...],
    grid: tuple[int, ...] | None,
) -> Shapes:
    """The shapes of all inputs of the batch that `step_batch` will make, known as soon as the prompts are read.

    Args:
        spec: of the step engine.
        images, branches: of the batch.
        longest: context rows of the longest branch.
        latent: of one image, `(C, H, W)`.
        grid: of the canvas, `(t, h, w)`.
    """
    count, branch_count, length = _extents(spec, images, branches, longest)
    leading: dict[str, tuple[int, ...]] = {
        "sample": (count, *latent),
        "guidance": (count, branch_count),
        "context": (count, branch_count, length),
        "canvas": (count, branch_count, *(grid or ())),
    }
    sizes = {
        symbol: size for tensor in spec.inputs for symbol, size in zip(tensor.shape, leading.get(tensor.name, ()), strict=False)
    }
    return {
        tensor.name: tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape) for tensor in spec.inputs
    }


def _extents(spec: EngineSpec, images: int, branches: int, longest: int) -> tuple[int, int, int]:
    """Images, branches and context rows of a batch: what the engine has fixed, or what is needed."""
    length = fixed(spec, "context", 2) or -(-longest // _CONTEXT_ROWS) * _CONTEXT_ROWS
    if longest > length:
        raise EngineError(f"step engine: takes {length} context rows, the prompt has {longest}; build it for more")
    return fixed(spec, "sample", 0) or images, fixed(spec, "guidance", 1) or branches, length


def _stacked(rows: Sequence[Sequence[Array]]) -> Array:
    """The arrays of all branches of all images as one array `[B, G, ...]`."""
    return np.stack([np.stack(image) for image in rows])
