"""Numbers that stay on a device between two engines, and are an array to whoever asks for them on the host.

What a planner gives a backbone may be keys and values of all its blocks: hundreds of megabytes for every request, which the
step's engine, on the same GPU, need not get by way of the host.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mc_runtime.backends.base import Array, Backend, Buffer


class Resident:
    """Part of a buffer, without gaps. `np.asarray` of it is a copy on the host, or a view where the device is the host.

    Its memory is the device's until nobody holds it any more.

    Args:
        backend: whose buffer it is.
        buffer: where the numbers are.
        shape: of this part; the buffer's own if not said.
        start: numbers of the buffer before this part.
    """

    __slots__ = ("backend", "buffer", "shape", "start")

    def __init__(self, backend: Backend, buffer: Buffer, shape: tuple[int, ...] | None = None, start: int = 0) -> None:
        self.backend = backend
        self.buffer = buffer
        self.shape = buffer.shape if shape is None else shape
        self.start = start

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the numbers."""
        return self.buffer.dtype

    @property
    def size(self) -> int:
        """How many numbers."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of this part."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Resident | Array:
        """One entry of the first axis, or its first few, stay where they are; any other choice is made on the host."""
        if isinstance(key, int) and 0 <= key < len(self):
            return Resident(self.backend, self.buffer, self.shape[1:], self.start + key * prod(self.shape[1:]))
        if isinstance(key, slice) and key.start is None and key.step is None and isinstance(key.stop, int) and key.stop >= 0:
            return Resident(self.backend, self.buffer, (min(len(self), key.stop), *self.shape[1:]), self.start)
        chosen: Array = np.asarray(self)[key]
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self.backend.to_host(self.buffer).reshape(-1)
        part = whole[self.start : self.start + self.size].reshape(self.shape)
        return part.astype(dtype or self.dtype, copy=bool(copy))
