"""What replaying CUDA graphs needs besides CUDA: buffers that come back to the same addresses, and graphs found by addresses.

A graph repeats launches with the very pointers it was captured with. The loop binds a few buffers for a request and runs the
step on them many times; with the next request of the same shapes (the same bucket) it gets the same buffers again, in the same
order, so that the graphs captured then still serve. Nothing here imports torch: handles are whatever the backend gives.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from mc_runtime.backends.base import Buffer
from mc_runtime.errors import EngineError

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


class GraphCache:
    """Captured graphs by what they were captured on, the least recently used dropped first.

    Args:
        capture: runs a function once, recording its launches, and returns what replays them.
        kept: how many graphs.
    """

    def __init__(self, capture: Callable[[Callable[[], None]], Callable[[], None]], kept: int = KEPT_GRAPHS) -> None:
        self._capture = capture
        self._kept = kept
        self._replays: OrderedDict[Hashable, Callable[[], None] | None] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, key: Hashable, launches: Callable[[], None]) -> None:
        """Launches as they are the first time a key is met (libraries set themselves up then), captures the second time and
        replays from there on."""
        with self._lock:
            if key not in self._replays:
                launches()
                self._replays[key] = None
            else:
                replay = self._replays[key]
                if replay is None:
                    replay = self._replays[key] = self._capture(launches)
                replay()
            self._replays.move_to_end(key)
            while len(self._replays) > self._kept:
                self._replays.popitem(last=False)


def in_order(names: Sequence[str], buffers: Mapping[str, Buffer], what: str) -> list[Buffer]:
    """The buffers of `names`, in that order. Raises EngineError unless these are exactly the ones given."""
    if set(names) != set(buffers):
        raise EngineError(f"{what}: given {sorted(buffers)}, there are {sorted(names)}")
    return [buffers[name] for name in names]


def graph_key(engine: Hashable, buffers: Sequence[Buffer], address: Callable[[Any], int]) -> Hashable:
    """What a graph depends on: the engine, and every bound buffer's address and shape."""
    return (engine, tuple((address(buffer.native), buffer.shape) for buffer in buffers))
