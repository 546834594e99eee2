"""The loop from noise to latents: the step engine does all the arithmetic, the host only swaps its buffers."""

from __future__ import annotations

import time
from collections import deque
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

    A device may have the next step under way while the host still waits for this one (`Backend.ahead`), so that it never idles.

    Raises EngineError naming the first step whose latents were found not to be finite, and Cancelled from the watch.
    """
    state = _StepState(step, batch, schedule, clock)
    under_way: deque[Callable[[], bool]] = deque()
    last = time.perf_counter()

    def finish(index: int) -> None:
        nonlocal last
        with clock:
            finite = under_way.popleft()()
        if not finite:
            raise EngineError(
                f"step {index + 1} of {len(schedule)}: the latents are not finite any more; build the step engine in "
                f"another precision than {step.spec.precision.value}, or lower the guidance"
            )
        start, last = last, time.perf_counter()
        watch.after_step(float(schedule.timesteps[index]), last - start, lambda: state.latents(index))
        last = time.perf_counter()  # what the watch did is no part of the next step

    for index in range(len(schedule)):
        watch.before_step()
        under_way.append(state.advance(index))
        if len(under_way) > step.backend.ahead:
            finish(index - step.backend.ahead)
    while under_way:
        finish(len(schedule) - len(under_way))
    return state.latents(len(schedule) - 1)


class _StepState:
    """The step engine bound to two sets of buffers, which are its input and its output in turn."""

    def __init__(self, step: LoadedEngine, batch: StepBatch, schedule: Schedule, clock: EngineClock) -> None:
        self._backend = step.backend
        self._clock = clock
        self._images = batch.images
        self._last = len(schedule) - 1
        count = len(batch.sample)
        timesteps = np.repeat(schedule.timesteps[:, None], count, axis=1)
        coefficients = np.repeat(schedule.coefficients[:, None], count, axis=1)
        # All steps' numbers go to the device before the loop: in it, the host hands over nothing and waits for nothing.
        self._scalars = [
            (self._backend.empty(rows.shape[1:]), self._backend.table(rows.astype(np.float32)))
            for rows in (timesteps, coefficients)
        ]
        self._samples = self._pair(batch.sample)
        constant = {name: self._backend.to_device(array) for name, array in batch.constant.items()}
        constant |= {name: now for name, (now, _) in zip(("timestep", "coefficients"), self._scalars, strict=True)}
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

    def advance(self, index: int) -> Callable[[], bool]:
        """Run step `index`, or begin to: what it writes is the next one's input. Whether that is finite is asked, too."""
        for now, rows in self._scalars:
            self._backend.select(now, rows, index)
        with self._clock:
            self._calls[index % 2].run()
        if index < self._last and not self._backend.asks_every_step:
            return lambda: True
        return self._backend.ask_finite(self._written(index))

    def latents(self, index: int) -> NDArray[np.float32]:
        """A copy of the latents that step `index` gave, until the second step after it runs; without the images that only
        fill up the batch."""
        return np.array(self._backend.to_host(self._written(index))[: self._images])

    def _written(self, index: int) -> Buffer:
        return self._samples[1 - index % 2]

    def _pair(self, start: Array) -> tuple[Buffer, Buffer]:
        first = self._backend.empty(start.shape)
        self._backend.write(first, start)
        return first, self._backend.empty(start.shape)
