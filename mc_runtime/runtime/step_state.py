"""What the loop swaps between two steps: the step engine bound to two sets of buffers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Array, Buffer
from mc_runtime.runtime.batch import StepBatch
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import EngineClock
from mc_runtime.sampling.tables import Schedule


class StepState:
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
        self._constant = {name: self._backend.to_device(array) for name, array in batch.constant.items()}
        self._constant["context"] = self._backend.rows(batch.context.pieces, batch.context.shape)
        self._constant |= {name: now for name, (now, _) in zip(("timestep", "coefficients"), self._scalars, strict=True)}
        self._swapped = [("sample", "next_sample", self._samples)]
        if batch.history is not None:
            self._swapped.append(("history", "next_history", self._pair(batch.history)))
        self._bind(step)

    def advance(self, index: int) -> Callable[[], bool]:
        """Run step `index`, or begin to: what it writes is the next one's input. Whether that is finite is asked, too."""
        for now, rows in self._scalars:
            self._backend.select(now, rows, index)
        self._run(index)
        if index < self._last and not self._backend.asks_every_step:
            return lambda: True
        return self._backend.ask_finite(self._written(index))

    def latents(self, index: int) -> NDArray[np.float32]:
        """A copy of the latents that step `index` gave, until the second step after it runs; without the images that only
        fill up the batch."""
        return np.array(self._backend.to_host(self._written(index))[: self._images])

    def _bind(self, step: LoadedEngine) -> None:
        self._calls = [step.engine.bind(self._inputs(here), self._outputs(here)) for here in (0, 1)]

    def _run(self, index: int) -> None:
        with self._clock:
            self._calls[index % 2].run()

    def _inputs(self, here: int) -> dict[str, Buffer]:
        return self._constant | {name: pair[here] for name, _, pair in self._swapped}

    def _outputs(self, here: int) -> dict[str, Buffer]:
        return {name: pair[1 - here] for _, name, pair in self._swapped}

    def _written(self, index: int) -> Buffer:
        return self._samples[1 - index % 2]

    def _pair(self, start: Array) -> tuple[Buffer, Buffer]:
        first = self._backend.empty(start.shape)
        self._backend.write(first, start)
        return first, self._backend.empty(start.shape)
