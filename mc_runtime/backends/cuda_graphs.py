"""What replaying CUDA graphs needs besides CUDA: graphs found by the addresses that they were captured with.

A graph repeats launches with the very pointers of its capture; `mc_runtime.backends.device_buffers` brings them back. Nothing
here imports torch: handles are whatever the backend gives.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from mc_runtime.backends.base import Buffer
from mc_runtime.errors import EngineError

Launches = Callable[[], None]

# A graph keeps what its launches need; two serve one bucket, one for either order of the swapped buffers.
KEPT_GRAPHS = 16


class Recorder(Protocol):
    """How launches become a graph; see `mc_runtime.backends.inductor_cuda`."""

    def warm_up(self, launches: Launches) -> None:
        """Run them as they are, in the surroundings in which they will be captured."""

    def capture(self, launches: Launches) -> Launches:
        """Run them once, recording instead of computing; what is returned replays them. Any exception means: not possible."""


class GraphCache:
    """Captured graphs by what they were captured on, the least recently used dropped first.

    Args:
        recorder: makes the graphs.
        kept: how many.

    Attributes:
        refused: why the last one that could not be captured could not; None where none was refused.
    """

    def __init__(self, recorder: Recorder, kept: int = KEPT_GRAPHS) -> None:
        self.refused: str | None = None
        self._recorder = recorder
        self._kept = kept
        # A graph's replay, or what there is instead: `warm` before it is captured, None where it cannot be.
        self._known: OrderedDict[Hashable, Launches | Literal["warm"] | None] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, key: Hashable, launches: Launches) -> None:
        """Launches as they are the first time a key is met (libraries set themselves up then), captures the second time and
        replays from there on. What cannot be captured is launched every time, and a warning says so once."""
        with self._lock:
            if key not in self._known:
                self._recorder.warm_up(launches)
                self._known[key] = "warm"
            else:
                known = self._known[key]
                replay = self._captured(launches) if known == "warm" else known
                (replay or launches)()
                self._known[key] = replay  # only now: what fails at once is tried again
            self._known.move_to_end(key)
            while len(self._known) > self._kept:
                self._known.popitem(last=False)

    def _captured(self, launches: Launches) -> Launches | None:
        """The graph, or None where there can be none. Launches are not kept: their buffers must go back to the pool."""
        try:
            return self._recorder.capture(launches)
        except (RuntimeError, EngineError) as error:
            self.refused = " ".join(str(error).split())[:200]
            what = f"steps are launched kernel by kernel, without a CUDA graph: {self.refused}"
            warnings.warn(what, RuntimeWarning, stacklevel=4)
            return None


class Calls:
    """Calls into a library by several threads: such as may overlap, and such as nothing may be beside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._wanting = 0

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """A call that waits for those that are alone. It must make no other one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._wanting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A call that waits for all others, and that later ones wait for. It must make no other one."""
        with self._changed:
            self._wanting += 1
            self._changed.wait_for(lambda: not self._inside)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._wanting -= 1
                self._changed.notify_all()


def in_order(names: Sequence[str], buffers: Mapping[str, Buffer], what: str) -> list[Buffer]:
    """The buffers of `names`, in that order. Raises EngineError unless these are exactly the ones given."""
    if set(names) != set(buffers):
        raise EngineError(f"{what}: given {sorted(buffers)}, there are {sorted(names)}")
    return [buffers[name] for name in names]


def graph_key(engine: int, buffers: Sequence[Buffer], address: Callable[[Any], int]) -> Hashable:
    """What a graph depends on: the engine, by a number that no other has, and every bound buffer's address and shape."""
    return (engine, tuple((address(buffer.native), buffer.shape) for buffer in buffers))
