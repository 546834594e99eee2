"""TensorRT's own progress, as a share of the whole, and the way to stop it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Phases:
    """The library's tree of phases: each has a number of steps, and is itself a part of its parent's current step."""

    def __init__(self) -> None:
        self._phases: dict[str, list[Any]] = {}  # name to [parent, steps, done]
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins."""
        self._phases[name] = [parent, max(1, steps), 0]

    def step(self, name: str, index: int) -> None:
        """A phase has finished the step of that index."""
        if name in self._phases:
            self._phases[name][2] = index + 1

    def finish(self, name: str) -> None:
        """A phase is over; its parent's step is not yet."""
        self._phases.pop(name, None)

    @property
    def share(self) -> float:
        """What is done of the whole, from 0 to 1; it never falls, though the library announces phases as it meets them."""
        roots = [name for name, (parent, _, _) in self._phases.items() if parent not in self._phases]
        if roots:
            self._share = max(self._share, min(1.0, sum(map(self._of, roots)) / len(roots)))
        return self._share

    def _of(self, name: str) -> float:
        _, steps, done = self._phases[name]
        children = [child for child, (parent, _, _) in self._phases.items() if parent == name]
        inner = sum(map(self._of, children)) / len(children) if children else 0.0
        return min(1.0, (done + inner) / steps)


def make_monitor(trt: Any, tick: Callable[[float], None]) -> Any:
    """The library's progress monitor that tells `tick` of the share that is done and stops the build where `tick` raises.

    What it raised comes out of `raise_what_stopped_it()`, to be called when the library has returned.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._stopped: BaseException | None = None
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases.start(name, parent, steps)

        def step_complete(self, name: str, index: int) -> bool:
            """Whether to go on. Nothing may be raised through the library's own frames, Ctrl-C neither."""
            try:
                with self._lock:
                    self._phases.step(name, index)
                    share = self._phases.share
                if self._stopped is None:
                    tick(share)
            except BaseException as error:
                self._stopped = error
            return self._stopped is None

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.finish(name)

        def raise_what_stopped_it(self) -> None:
            if self._stopped is not None:
                raise self._stopped

    return Monitor()
