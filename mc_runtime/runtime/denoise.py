"""The loop from noise to latents: the step engine does all the arithmetic, the host only swaps its buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Array, Buffer
from mc_runtime.errors import EngineError
from mc_runtime.runtime.engines import EngineClock, LoadedEngine, fixed, padded
from mc_runtime.runtime.plan import Branch
from mc_runtime.sampling.tables import Schedule

# Context rows are padded to a multiple of this, so that an engine that specialises itself for the shapes it
# meets meets few. Masked rows have no weight.
_CONTEXT_ROWS = 32


@dataclass(frozen=True)
class StepBatch:
    """What one run of the step engine works on: B images, G guidance branches.

    Attributes:
        sample: f32 `[B, C, H, W]`, the noise, scaled as the sampler wants it.
        guidance: f32 `[B, G]`, the weights of the branches.
        context: f32 `[B, G, L, D_ctx]`.
        context_mask: i64 `[B, G, L]`.
        canvas: f32 `[B, G, t, h, w, D_b]`, or None.
        images: how many of the B images are asked for; the rest fill up an engine of a fixed batch.
    """

    sample: Array
    guidance: Array
    context: Array
    context_mask: Array
    canvas: Array | None
    images: int


class Watch(Protocol):
    """Who looks on while the loop runs."""

    def before_step(self) -> None:
        """Raise Cancelled where the caller has had enough."""

    def after_step(self, timestep: float, seconds: float, latents: Callable[[], Array]) -> None:
        """Hear of a finished step."""


def denoise(step: LoadedEngine, batch: StepBatch, schedule: Schedule, clock: EngineClock, watch: Watch) -> Array:
    """Latents f32 `[images, C, H, W]` from a batch of noise.

    Raises EngineError naming the first step whose latents are not finite, and Cancelled from the watch.
    """
    state = _StepState(step, batch, schedule, clock)
    for index, timestep in enumerate(schedule.timesteps):
        watch.before_step()
        start = time.perf_counter()
        state.advance(index)
        if not state.is_finite():
            raise EngineError(
                f"step {index + 1} of {len(schedule)}: the latents are not finite any more; build the step engine in "
                f"another precision than {step.spec.precision.value}, or lower the guidance"
            )
        watch.after_step(float(timestep), time.perf_counter() - start, state.latents)
    return state.latents()


def step_batch(
    spec_of: LoadedEngine, noise: Array, branches: Sequence[Sequence[Branch]], weights: Sequence[float]
) -> StepBatch:
    """Put images into one batch.

    Args:
        noise: f32 `[images, C, H, W]`.
        branches: for every image, as many branches as there are weights.
        weights: of the branches, the same for every image.

    Dimensions that the engine has fixed are filled up: rows and branches without weight, images by repeating
    the last.
    """
    spec = spec_of.spec
    images = len(noise)
    count = fixed(spec, "sample", 0) or images
    branch_count = fixed(spec, "guidance", 1) or len(weights)
    rows = [[*image, *[image[0]] * (branch_count - len(image))] for image in branches]
    rows += [rows[-1]] * (count - images)
    longest = max(len(branch.context) for image in rows for branch in image)
    length = fixed(spec, "context", 2) or -(-longest // _CONTEXT_ROWS) * _CONTEXT_ROWS
    if longest > length:
        raise EngineError(f"step engine: takes {length} context rows, the prompt has {longest}; build it for more")
    return StepBatch(
        sample=np.concatenate([noise, *[noise[-1:]] * (count - images)]),
        guidance=np.tile(padded(np.array(weights, np.float32), 0, branch_count), (count, 1)),
        context=_stack(rows, lambda branch: padded(branch.context, 0, length)),
        context_mask=_stack(rows, lambda branch: padded(branch.context_mask, 0, length)),
        canvas=_stack(rows, lambda branch: branch.canvas) if spec.input("canvas") else None,
        images=images,
    )


class _StepState:
    """The step engine bound to two sets of buffers, which are its input and its output in turn."""

    def __init__(self, step: LoadedEngine, batch: StepBatch, schedule: Schedule, clock: EngineClock) -> None:
        self._backend = step.backend
        self._clock = clock
        self._images = batch.images
        count = len(batch.sample)
        self._timesteps = np.repeat(schedule.timesteps[:, None], count, axis=1)
        self._coefficients = np.repeat(schedule.coefficients[:, None], count, axis=1)
        self._timestep = self._backend.empty((count,))
        self._coefficient = self._backend.empty(self._coefficients.shape[1:])
        self._samples = self._pair(batch.sample)
        constant = {
            "timestep": self._timestep,
            "coefficients": self._coefficient,
            "guidance": self._backend.to_device(batch.guidance),
            "context": self._backend.to_device(batch.context),
            "context_mask": self._backend.to_device(batch.context_mask),
        }
        if batch.canvas is not None:
            constant["canvas"] = self._backend.to_device(batch.canvas)
        swapped = [("sample", "next_sample", self._samples)]
        rows = 2 * (schedule.order - 1)
        if rows:
            shape = (count, rows, *batch.sample.shape[1:])
            swapped.append(("history", "next_history", self._pair(np.zeros(shape, np.float32))))
        self._calls = [
            step.engine.bind(
                constant | {name: pair[here] for name, _, pair in swapped},
                {name: pair[1 - here] for _, name, pair in swapped},
            )
            for here in (0, 1)
        ]
        self._now = 0

    def advance(self, index: int) -> None:
        """Run step `index`; what it wrote is the next one's input."""
        self._backend.write(self._timestep, self._timesteps[index])
        self._backend.write(self._coefficient, self._coefficients[index])
        with self._clock:
            self._calls[self._now].run()
        self._now = 1 - self._now

    def is_finite(self) -> bool:
        """Whether the latents are numbers still: a sum over them, some microseconds."""
        return self._backend.is_finite(self._samples[self._now])

    def latents(self) -> NDArray[np.float32]:
        """A copy of the latents as they are now, without the images that only fill up the batch."""
        return np.array(self._backend.to_host(self._samples[self._now])[: self._images])

    def _pair(self, start: Array) -> tuple[Buffer, Buffer]:
        first = self._backend.empty(start.shape)
        self._backend.write(first, start)
        return first, self._backend.empty(start.shape)


def _stack(rows: Sequence[Sequence[Branch]], of: Callable[[Branch], Array | None]) -> Array:
    """The arrays of all branches of all images as one array `[B, G, ...]`."""
    return np.stack([np.stack([of(branch) for branch in image]) for image in rows])  # type: ignore[misc]
