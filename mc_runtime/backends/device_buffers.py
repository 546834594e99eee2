"""Buffers in a GPU's memory that come back to the same addresses.

The loop binds a few buffers for a request and runs the step on them many times; with the next request of the same shapes (the
same bucket) it gets the same buffers again, in the same order, so that the CUDA graphs captured then still serve.
"""

from __future__ import annotations

import heapq
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from mc_runtime.backends.base import Array, Backend, Buffer, Settings
from mc_runtime.errors import EngineError


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


class PooledBackend(Backend):
    """A backend whose device is a GPU, and whose buffers come from a pool."""

    devices = ("cuda",)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._pool = BufferPool(self.allocate)

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """The library's handle of new memory on the GPU. Raises EngineError where there is none left."""

    def to_device(self, array: Array) -> Buffer:
        """See `Backend.to_device`; a copy on the GPU."""
        buffer = self._pool.buffer(array.shape, str(array.dtype))
        self.write(buffer, array)
        return buffer

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """See `Backend.empty`."""
        return self._pool.buffer(tuple(shape), dtype)
