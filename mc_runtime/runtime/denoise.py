"""The loop from noise to latents: the step engine does all the arithmetic, the host only swaps its buffers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Array, Buffer
from mc_runtime.errors import EngineError
from mc_runtime.runtime.batch import StepBatch
from mc_runtime.runtime.engines import EngineClock, LoadedEngine
from mc_runtime.sampling.tables import Schedule


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
        constant = {name: self._backend.to_device(array) for name, array in batch.constant.items()}
        constant |= {"timestep": self._timestep, "coefficients": self._coefficient}
        swapped = [("sample", "next_sample", self._samples)]
        if batch.history is not None:
            swapped.append(("history", "next_history", self._pair(batch.history)))
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
