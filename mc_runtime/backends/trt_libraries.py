"""TensorRT and TensorRT for RTX: one interface under two names. What differs is this table; what their versions differ in is
asked of the library (`getattr`), here and nowhere else. Nothing is imported before `load`.
"""

from __future__ import annotations

import gc
import threading
from contextlib import ContextDecorator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mc_runtime.errors import EngineError


@dataclass(frozen=True)
class TrtLibrary:
    """One of the two.

    Attributes:
        target: its name among the targets.
        module: what is imported.
        distributions: what it may be installed as.
        install: the command that installs it.
        builds_anywhere: it builds without a GPU, for compute capabilities that are named; else for the GPU at hand.
        captures_graphs: it captures CUDA graphs itself and compiles kernels when they are first run, which a cache keeps.
    """

    target: str
    module: str
    distributions: tuple[str, ...]
    install: str
    builds_anywhere: bool
    captures_graphs: bool

    def load(self) -> Any:
        """The module.

        Raises:
            EngineError: it is not installed; the message says how to install it.
        """
        try:
            return import_module(self.module)
        except ImportError as error:
            why = "is not installed" if getattr(error, "name", None) == self.module else f"does not load ({error})"
            raise EngineError(f"{self.target}: {self.module} {why}; {self.install}") from None


TRT_LIBRARIES = {
    library.target: library
    for library in (
        TrtLibrary(
            target="tensorrt",
            module="tensorrt",
            distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
            install="pip install 'mc-runtime[tensorrt]'",
            builds_anywhere=False,
            captures_graphs=False,
        ),
        TrtLibrary(
            target="tensorrt-rtx",
            module="tensorrt_rtx",
            distributions=("tensorrt-rtx",),
            install="pip install 'mc-runtime[tensorrt-rtx]'",
            builds_anywhere=True,
            captures_graphs=True,
        ),
    )
}
"""By target."""


def network_flags(trt: Any) -> int:
    """Flags of a strongly typed network: TensorRT 10 has to be told, TensorRT 11 knows nothing else."""
    typed = getattr(getattr(trt, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
    return 0 if typed is None else 1 << int(typed)


def device_bytes(engine: Any) -> int:
    """Memory that a run of an engine needs beside weights, inputs and outputs; TensorRT 11 dropped the older name."""
    size = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if size is None else size)


class _CollectingNothing(ContextDecorator):
    """No garbage collection while the library works in any thread, but one before.

    It calls its logger with a lock held that the end of a builder or an engine takes, too: one of those in a cycle (an error's
    traceback makes one) that is collected inside the call waits for itself for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = True

    def __enter__(self) -> None:
        gc.collect()
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self) -> None:
        """Switches it off, as often as it is switched on again, without collecting first."""
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def end(self) -> None:
        """Switches it on again."""
        with self._lock:
            self._inside -= 1
            if not self._inside and self._was_on:
                gc.enable()


collecting_nothing = _CollectingNothing()
"""One for the process, which has one collector."""


def make_log(trt: Any) -> Any:
    """A logger that keeps the library's errors instead of printing them: `errors`, a list of lines."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))

        def take(self) -> str:
            """The errors since the last call, as one line."""
            said, self.errors = "; ".join(dict.fromkeys(self.errors)), []
            return said or "it gives no reason"

    return Log()
