"""What replaying CUDA graphs needs besides CUDA: buffers that come back to the same addresses, and graphs found by addresses.

A graph repeats launches with the very pointers it was captured with. The loop binds a few buffers for a request and runs the
step on them many times; with the next request of the same shapes (the same bucket) it gets the same buffers again, in the same
order, so that the graphs captured then still serve. Nothing here imports torch: handles are whatever the backend gives.
"""

from __future__ import annotations

import heapq
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from mc_runtime.backends.base import Buffer
from mc_runtime.errors import EngineError

Launches = Callable[[], None]

# A graph keeps what its launches need; two serve one bucket, one for either order of the swapped buffers.
KEPT_GRAPHS = 16


class BufferPool:
    """Device memory that is handed out again, the longest owned first, when its buffer is gone.

    Args:
        allocate: gives a new handle for a shape and a dtype; asked only where no free one fits.
    """

    def __init__(self, allocate: Callable[[tuple[int, ...], str], Any]) -> None:
        self._allocate = allocate
        self._free: dict[Hashable, list[tuple[int, Any]]] = {}
        self._count = 0
        self._lock = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer with unspecified contents; its memory returns to the pool with the last reference to it."""
        key = (shape, dtype)
        with self._lock:
            free = self._free.setdefault(key, [])
            if free:
                serial, handle = heapq.heappop(free)
            else:
                self._count += 1
                serial, handle = self._count, self._allocated(shape, dtype)
        buffer = Buffer(handle, shape, np.dtype(dtype))
        weakref.finalize(buffer, self._return, key, serial, handle).atexit = False
        return buffer

    def _allocated(self, shape: tuple[int, ...], dtype: str) -> Any:
        try:
            return self._allocate(shape, dtype)
        except EngineError:  # what other shapes left behind may be in the way
            for free in self._free.values():
                free.clear()
            return self._allocate(shape, dtype)

    def _return(self, key: Hashable, serial: int, handle: Any) -> None:
        # No lock: a finalizer may run inside `buffer`, in its thread. A push is one call of C under the interpreter's lock.
        heapq.heappush(self._free[key], (serial, handle))


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
    """

    def __init__(self, recorder: Recorder, kept: int = KEPT_GRAPHS) -> None:
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
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"steps are launched kernel by kernel, without a CUDA graph: {reason}", RuntimeWarning, stacklevel=4)
            return None


def in_order(names: Sequence[str], buffers: Mapping[str, Buffer], what: str) -> list[Buffer]:
    """The buffers of `names`, in that order. Raises EngineError unless these are exactly the ones given."""
    if set(names) != set(buffers):
        raise EngineError(f"{what}: given {sorted(buffers)}, there are {sorted(names)}")
    return [buffers[name] for name in names]


def graph_key(engine: int, buffers: Sequence[Buffer], address: Callable[[Any], int]) -> Hashable:
    """What a graph depends on: the engine, by a number that no other has, and every bound buffer's address and shape."""
    return (engine, tuple((address(buffer.native), buffer.shape) for buffer in buffers))
