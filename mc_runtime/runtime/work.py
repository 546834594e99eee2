"""What accompanies a request while it is worked on: clocks, progress, and the caller's wish to stop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import Cancelled, RequestError, shown
from mc_runtime.runtime.result import Step

OnStep = Callable[[Step], object]


class EngineClock:
    """Adds up the time between entering and leaving, over all uses in one request."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Event(Protocol):
    """Anything like `threading.Event`."""

    def is_set(self) -> bool:
        """Whether the work should stop."""


Cancel = Event | Callable[[], bool]


class Stopwatch:
    """Seconds a stage, added up over batches."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def timings(self) -> dict[str, float]:
        """All stages, and `total` since the stopwatch was made."""
        return {**self._seconds, "total": time.perf_counter() - self._start}


class Work:
    """One request's clock, its progress, and its caller's wish to stop; `frames` counts those the autoencoder did."""

    def __init__(self, on_step: OnStep | None = None, cancel: Cancel | None = None) -> None:
        if on_step is not None and not callable(on_step):
            raise RequestError(f"on_step must be a function that takes a Step, got {shown(on_step)}")
        self.stopwatch = Stopwatch()
        self.clock = EngineClock()
        self._on_step = on_step
        self._cancelled = _question(cancel)
        self._done = 0
        self._total = 0
        self.frames = 0

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""
        self._total = steps

    def stop_if_cancelled(self) -> None:
        """Raise Cancelled where the caller has had enough."""
        if self._cancelled():
            raise Cancelled(f"cancelled after {self._done} steps; nothing was kept")

    def before_step(self) -> None:
        """See `denoise.Watch`."""
        self.stop_if_cancelled()

    def after_step(self, timestep: float, seconds: float, latents: Callable[[], NDArray[np.float32]]) -> None:
        """See `denoise.Watch`."""
        self._done += 1
        if self._on_step is not None:
            self._on_step(Step(self._done - 1, self._total, timestep, seconds, latents))

    def before_chunk(self) -> None:
        """See `clips.ChunkWatch`."""
        self.stop_if_cancelled()

    def after_chunk(self, frames: int, seconds: float) -> None:
        """See `clips.ChunkWatch`."""
        self.frames += frames

    def timings(self) -> dict[str, float]:
        """Seconds a stage, and those inside engines."""
        return self.stopwatch.timings() | {"engines": self.clock.seconds}


def _question(cancel: Cancel | None) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    if hasattr(cancel, "is_set"):
        return cancel.is_set
    if callable(cancel):
        return cancel
    raise RequestError("cancel must be a threading.Event or a function without arguments")
