"""Images side by side: the inputs of the step engine for one batch, and their shapes before they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mc_runtime.backends.base import Array, Shapes
from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.errors import BundleError, EngineError
from mc_runtime.runtime.engines import fixed, padded
from mc_runtime.runtime.plan import Branch

# Context rows are padded to a multiple of this, so that an engine that is compiled for the shapes it meets, meets
# few. Masked rows have no weight.
_CONTEXT_ROWS = 32


@dataclass(frozen=True, eq=False)
class Rows:
    """An array `[..., L, D]` that is not put together yet: one piece `[l, D]`, `l <= L`, for each of its leading indices."""

    pieces: Sequence[Array | Resident]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StepBatch:
    """What one run of the step engine works on: B images, G guidance branches.

    Attributes:
        sample: f32 `[B, C, (T,) H, W]`, the noise, scaled as the sampler wants it.
        history: f32 `[B, K, C, (T,) H, W]`, zeros; None where the sampler looks at one sample only.
        context: f32 `[B, G, L, D_ctx]`, by rows of every branch of every image.
        constant: what else no step changes: `guidance` f32 `[B, G]` (or `[B, G, T]`), `context_mask` i64 `[B, G, L]`, for
            MetaCanvas `canvas` f32 `[B, G, t, h, w, D_b]`, and the backbone's conditions.
        images: how many of the B images are asked for; the rest fill up an engine of a fixed batch.
    """

    sample: Array
    history: Array | None
    context: Rows
    constant: Mapping[str, Array]
    images: int


def step_batch(
    spec: EngineSpec,
    noise: Array,
    branches: Sequence[Sequence[Branch]],
    weights: Array,
    conditions: Mapping[str, Array] | None = None,
) -> StepBatch:
    """Put images into one batch.

    Dimensions that the engine has fixed are filled up: rows and branches without weight, images by repeating the last.

    Args:
        spec: of the step engine.
        noise: f32 `[images, C, (T,) H, W]`.
        branches: for every image, as many branches as there are weights.
        weights: of the branches, the same for every image: f32 `[branches]`, or `[branches, T]`.
        conditions: the backbone's further inputs, `[images, ...]`, or `[images, branches, ...]` as the engine has it.
    """
    images = len(noise)
    longest = max(len(branch.context) for image in branches for branch in image)
    count, branch_count, length = _extents(spec, images, len(weights), longest)
    rows = [[*image, *[image[0]] * (branch_count - len(image))] for image in branches]
    rows += [rows[-1]] * (count - images)
    sample = np.concatenate([noise, *[noise[-1:]] * (count - images)])
    constant = {
        "guidance": np.repeat(padded(weights, 0, branch_count)[None], count, axis=0),
        "context_mask": _stacked([[padded(branch.context_mask, 0, length) for branch in image] for image in rows]),
    }
    contexts = [branch.context for image in rows for branch in image]
    context = Rows(contexts, (count, branch_count, length, *contexts[0].shape[1:]))
    canvases = [[branch.canvas for branch in image if branch.canvas is not None] for image in rows]
    if spec.input("canvas"):
        constant["canvas"] = _stacked(canvases)
    for name, array in (conditions or {}).items():
        tensor = spec.input(name)
        if tensor is None:
            raise EngineError(f"step engine: has no input {name!r}, which its manifest names; build the bundle again")
        whole = np.concatenate([array, *[array[-1:]] * (count - images)])
        if tensor.shape[1:2] == guidance_dimension(spec):
            whole = np.concatenate([whole, *[whole[:, :1]] * (branch_count - whole.shape[1])], axis=1)
        constant[name] = whole
    kept = fixed(spec, "history", 1)
    history = np.zeros((count, kept, *sample.shape[1:]), np.float32) if kept else None
    return StepBatch(sample, history, context, constant, images)


def guidance_dimension(spec: EngineSpec) -> tuple[int | str, ...]:
    """The dimension of branches, as the engine names it; a condition that has it second is one of branches."""
    guidance = spec.input("guidance")
    return guidance.shape[1:2] if guidance is not None else ()


def step_shapes(
    spec: EngineSpec,
    *,
    images: int,
    branches: int,
    longest: int,
    latent: tuple[int, ...],
    grid: tuple[int, ...] | None,
    conditions: Mapping[str, tuple[int, ...]] | None = None,
) -> Shapes:
    """The shapes of all inputs of the batch that `step_batch` will make, known as soon as the prompts are read.

    Args:
        spec: of the step engine.
        images, branches: of the batch.
        longest: context rows of the longest branch.
        latent: of one image, `(C, (T,) H, W)`.
        grid: of the canvas, `(t, h, w)`.
        conditions: of one image, for those whose sizes are not the latents'.
    """
    count, branch_count, length = _extents(spec, images, branches, longest)
    leading: dict[str, tuple[int, ...]] = {
        "sample": (count, *latent),
        "guidance": (count, branch_count),
        "context": (count, branch_count, length),
        "canvas": (count, branch_count, *(grid or ())),
    } | {name: (count, *shape) for name, shape in (conditions or {}).items()}
    sizes = {
        symbol: size for tensor in spec.inputs for symbol, size in zip(tensor.shape, leading.get(tensor.name, ()), strict=False)
    }
    try:
        return {
            tensor.name: tuple(size if isinstance(size, int) else sizes[size] for size in tensor.shape)
            for tensor in spec.inputs
        }
    except KeyError as error:
        raise BundleError(
            f"step engine: nothing of a request has the dimension {error}; build the bundle again with `mc-runtime build`"
        ) from None


def _extents(spec: EngineSpec, images: int, branches: int, longest: int) -> tuple[int, int, int]:
    """Images, branches and context rows of a batch: what the engine has fixed, or what is needed."""
    length = fixed(spec, "context", 2) or -(-longest // _CONTEXT_ROWS) * _CONTEXT_ROWS
    if longest > length:
        raise EngineError(f"step engine: takes {length} context rows, the prompt has {longest}; build it for more")
    return fixed(spec, "sample", 0) or images, fixed(spec, "guidance", 1) or branches, length


def _stacked(rows: Sequence[Sequence[Array]]) -> Array:
    """The arrays of all branches of all images as one array `[B, G, ...]`."""
    every = [array for image in rows for array in image]
    return np.stack(every).reshape(len(rows), len(rows[0]), *every[0].shape)
