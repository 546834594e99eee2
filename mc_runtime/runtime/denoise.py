"""The loop from noise to latents: the step engine does all the arithmetic, the host only swaps its buffers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from mc_runtime.backends.base import Array
from mc_runtime.errors import EngineError
from mc_runtime.runtime.batch import StepBatch
from mc_runtime.runtime.cut_state import Cut, CutState
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.step_state import StepState
from mc_runtime.runtime.work import EngineClock
from mc_runtime.sampling.tables import Schedule


class Watch(Protocol):
    """Who looks on while the loop runs."""

    def before_step(self) -> None:
        """Raise Cancelled where the caller has had enough."""

    def after_step(self, timestep: float, seconds: float, latents: Callable[[], Array]) -> None:
        """Hear of a finished step."""


def denoise(
    step: LoadedEngine, batch: StepBatch, schedule: Schedule, clock: EngineClock, watch: Watch, cut: Cut | None = None
) -> Array:
    """Latents f32 `[images, C, H, W]` from a batch of noise; with `cut`, `step` is the first part of a step.

    A device may have the next step under way while the host still waits for this one (`Backend.ahead`), so that it never idles.

    Raises EngineError naming the first step whose latents were found not to be finite, and Cancelled from the watch.
    """
    state = CutState(step, cut, batch, schedule, clock) if cut else StepState(step, batch, schedule, clock)
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
