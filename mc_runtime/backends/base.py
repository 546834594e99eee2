"""What a library must do to run engines: load one, describe it, run it on tensors of its own, and move arrays
in and out.

A loop that runs an engine many times binds it once to its buffers, for each order in which they are swapped,
and then only calls `run` on the bound calls: nothing is allocated, copied or looked up between two steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import EngineError, RequestError

Array = NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
"""The sizes of an engine's inputs in one run, by name."""


@dataclass(frozen=True)
class Settings:
    """How engines are run: `threads` (None: the library's choice), `device` (None: what each target runs on), and where
    compiled engines may be kept."""

    threads: int | None = None
    device: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Buffer:
    """A tensor that stays where it is: the library's own handle, and its memory as an array where the host sees it."""

    native: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    array: Array | None = None


class Call(ABC):
    """An engine with its buffers bound."""

    @abstractmethod
    def run(self) -> None:
        """Read the bound inputs, compute, fill the bound outputs. Raises EngineError."""


class Engine(ABC):
    """One loaded component. `name` is the component and `path` its file, for messages."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path

    @abstractmethod
    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs and outputs as the library itself reports them; unnamed dynamic dimensions are `?`."""

    def prepare(self, shapes: Shapes) -> None:  # noqa: B027  # most libraries run any shape as it comes
        """Do now what the library would do when these shapes first come. Raises EngineError."""

    @abstractmethod
    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """Tie every input and output to a buffer of the backend that loaded this engine. Raises EngineError."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """Run once, letting the library allocate the outputs. Raises EngineError."""

    def fail(self, what: str, error: Exception) -> NoReturn:
        """Raise the library's error as ours, in one line."""
        reason = " ".join(str(error).split())
        raise EngineError(f"{self.name} engine ({self.path}) {what}: {reason[:400]}") from error


class Backend(ABC):
    """A library that runs engines on one device."""

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    ahead: ClassVar[int] = 0
    """How many runs a loop may have under way beside the one it waits for: 0 where a run ends before its call returns."""
    asks_every_step: ClassVar[bool] = True
    """Whether a loop asks after every step if its latents are finite; where the answer would stop the device, it asks after
    the last one, whose latents have every NaN of the steps before."""
    keeps: ClassVar[bool] = False
    """Whether what one engine gives another stays on the device (`Resident`), where `rows` takes it."""
    looks_there: ClassVar[bool] = False
    """Whether `is_finite` looks at a buffer where it is, and only the answer comes to the host."""

    def __init__(self, settings: Settings) -> None:
        if settings.device is not None and settings.device not in self.devices:
            raise RequestError(
                f"device {settings.device!r}: {self.name} engines run on {' or '.join(self.devices)}; ask for that device"
            )
        self.settings = settings

    def admit(self, engines: Mapping[str, EngineSpec]) -> None:  # noqa: B027  # most backends take any
        """Look at all of a bundle's engines before any is loaded. Raises EngineError where there is no room for them."""

    def check(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> None:  # noqa: B027  # optional
        """Whether this machine can run an engine, as far as that is known without loading it.

        Raises EngineError or BundleError where it cannot.
        """

    @abstractmethod
    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """Load an engine from its files (the first is the one to open). Raises EngineError."""

    @abstractmethod
    def to_device(self, array: Array) -> Buffer:
        """A buffer with this array's numbers; on the host's own memory it is the same memory, not a copy."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """A buffer with unspecified contents."""

    def rows(self, pieces: Sequence[Array | Resident], shape: tuple[int, ...]) -> Buffer:
        """A buffer f32 `[..., L, D]` with the next piece `[l, D]` at each of its leading indices, and zeros behind its rows."""
        whole = np.zeros(shape, np.float32)
        for place, piece in zip(whole.reshape(-1, *shape[-2:]), pieces, strict=True):
            place[: len(piece)] = piece
        return self.to_device(whole)

    @abstractmethod
    def write(self, buffer: Buffer, array: Array) -> None:
        """Overwrite a buffer with an array that broadcasts to its shape."""

    def table(self, rows: Array) -> Any:
        """Rows `[n, ...]` for `select` to take from, kept where that is done without waiting."""
        return rows

    def select(self, buffer: Buffer, table: Any, index: int) -> None:
        """Overwrite a buffer with one of the rows of a table."""
        self.write(buffer, table[index])

    @abstractmethod
    def to_host(self, buffer: Buffer) -> Array:
        """The buffer's numbers; on the host's own memory a view, so copy what must outlive the next run."""

    def is_finite(self, buffer: Buffer) -> bool:
        """Whether no number of the buffer is NaN or infinite."""
        return all_finite(self.to_host(buffer))

    def ask_finite(self, buffer: Buffer) -> Callable[[], bool]:
        """`is_finite` of the buffer as it is behind the runs so far; the answer waits for those runs, and for no later one."""
        found = self.is_finite(buffer)
        return lambda: found


def all_finite(array: Array) -> bool:
    """Whether no number is NaN or infinite; one pass over them as a sum, two only when that fails."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


class HostBackend(Backend):
    """A backend whose device is the CPU: its buffers are numpy arrays that the library reads and writes in place."""

    devices = ("cpu",)

    @abstractmethod
    def wrap(self, array: Array) -> Any:
        """The library's tensor over this C-contiguous array's memory."""

    def to_device(self, array: Array) -> Buffer:
        """See `Backend.to_device`; only an array that is read-only or not contiguous is copied."""
        if not (array.flags.c_contiguous and array.flags.writeable):
            array = np.array(array, order="C")
        return Buffer(self.wrap(array), array.shape, array.dtype, array)

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        """See `Backend.empty`."""
        return self.to_device(np.empty(shape, dtype))

    def write(self, buffer: Buffer, array: Array) -> None:
        """See `Backend.write`."""
        np.copyto(self.to_host(buffer), array)

    def to_host(self, buffer: Buffer) -> Array:
        """See `Backend.to_host`."""
        assert buffer.array is not None  # every buffer of a host backend has its array
        return buffer.array
