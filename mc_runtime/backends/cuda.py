"""Memory, streams and graphs of an NVIDIA GPU through `cuda.bindings`, each error with its mend.

Not run on a GPU yet; the calls are tested against a stand-in that behaves as the CUDA runtime documents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from math import prod
from typing import Any

import numpy as np

from mc_runtime.backends.base import Array
from mc_runtime.backends.gpu import Gpu, gpu_mend
from mc_runtime.errors import EngineError

_INSTALL = "pip install cuda-bindings, of your driver's CUDA major version"


def load_cuda() -> Any:
    """The CUDA runtime's bindings. Raises EngineError where they are not installed."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(f"cuda.bindings is not installed, which GPU buffers need ({error}); {_INSTALL}") from None


def this_gpu(cuda: Any) -> Gpu | None:
    """The GPU that this process would use, or None where there is none, or no driver for it.

    Raises:
        EngineError: there is a driver, and CUDA does not work with it.
    """
    status, count = cuda.cudaGetDeviceCount()
    if int(status) not in (0, int(cuda.cudaError_t.cudaErrorNoDevice)) and check(cuda, cuda.cudaDriverGetVersion())[0]:
        try:
            check(cuda, (status,))
        except EngineError as error:
            raise EngineError(f"{error}; or {_INSTALL}") from None
    if int(status) or not count:
        return None
    (device,) = check(cuda, cuda.cudaGetDevice())
    (properties,) = check(cuda, cuda.cudaGetDeviceProperties(device))
    free, _ = check(cuda, cuda.cudaMemGetInfo())
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(name.rstrip("\0"), (int(properties.major), int(properties.minor)), int(free))


def check(cuda: Any, returned: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the CUDA runtime gave beside its status. Raises EngineError for any status but success."""
    status, *results = returned
    if int(status):
        _, text = cuda.cudaGetErrorString(status)
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(f"CUDA: {gpu_mend(said)}")
    return tuple(results)


class Memory:
    """A piece of GPU memory, freed when nobody holds it any more. `address` is 256-byte aligned, as CUDA gives it."""

    def __init__(self, cuda: Any, size: int) -> None:
        self._cuda = cuda
        self.size = max(1, size)
        self.address = 0
        (address,) = check(cuda, cuda.cudaMalloc(self.size))
        self.address = int(address)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._cuda.cudaFree(self.address)  # waits for the launches that use it; at exit its error says nothing


class Landing:
    """Host memory that the GPU writes to while the host goes on, and the event that says when it has; freed with its holder."""

    def __init__(self, cuda: Any, size: int) -> None:
        self._cuda = cuda
        self.size = max(1, size)
        self.address, self._event = 0, None
        (address,) = check(cuda, cuda.cudaMallocHost(self.size))
        self.address = int(address)
        (self._event,) = check(cuda, cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))

    def record(self, stream: Any) -> None:
        """What the stream was asked for so far is what `array` waits for."""
        check(self._cuda, self._cuda.cudaEventRecord(self._event, stream))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The numbers, once they are there; a view, valid until the next copy."""
        check(self._cuda, self._cuda.cudaEventSynchronize(self._event))
        memory = (ctypes.c_byte * self.size).from_address(self.address)
        found: Array = np.frombuffer(memoryview(memory), dtype, prod(shape)).reshape(shape)
        return found

    def __del__(self) -> None:
        if getattr(self, "_event", None) is not None:
            self._cuda.cudaEventDestroy(self._event)
        if getattr(self, "address", 0):
            self._cuda.cudaFreeHost(self.address)  # waits for the copy; at exit its error says nothing


class Stream:
    """One queue of copies and launches, in the order they were asked for."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        (self._handle,) = check(cuda, cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.settle()  # for contexts that are collected with it, and may go later
            self._cuda.cudaStreamDestroy(self._handle)  # at exit its error says nothing
            self._handle = None

    @property
    def handle(self) -> int:
        """What engine libraries take."""
        return int(self._handle)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Memory:
        """Memory for a tensor."""
        return Memory(self._cuda, prod(shape) * np.dtype(dtype).itemsize)

    def upload(self, memory: Memory, array: Array, at: int = 0) -> None:
        """Copy a contiguous array to the GPU, to byte `at` of a piece of memory, in the order of the launches; the array may
        change as soon as this returns, hence the wait: CUDA does not promise to have read pageable memory before the copy."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._cuda, self._cuda.cudaMemcpyAsync(memory.address + at, array.ctypes.data, array.nbytes, kind, self._handle))
        self.wait()

    def copy(self, target: Memory, source: Memory, size: int, offset: int = 0, at: int = 0) -> None:
        """Copy bytes on the GPU, from `offset` on to `at`, in the order of the launches."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(self._cuda, self._cuda.cudaMemcpyAsync(target.address + at, source.address + offset, size, kind, self._handle))

    def clear(self, memory: Memory) -> None:
        """Zeros in a whole piece of memory, in the order of the launches."""
        check(self._cuda, self._cuda.cudaMemsetAsync(memory.address, 0, memory.size, self._handle))

    def download(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The numbers after all launches so far."""
        array: Array = np.empty(shape, dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._cuda, self._cuda.cudaMemcpyAsync(array.ctypes.data, memory.address, array.nbytes, kind, self._handle))
        self.wait()
        return array

    def begin_download(self, memory: Memory, landing: Landing) -> None:
        """Copy a whole piece of memory to the host, in the order of the launches, and go on."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._cuda, self._cuda.cudaMemcpyAsync(landing.address, memory.address, landing.size, kind, self._handle))
        landing.record(self._handle)

    def wait(self) -> None:
        """Until everything asked for so far is done. An error of a launch comes up here."""
        check(self._cuda, self._cuda.cudaStreamSynchronize(self._handle))

    def settle(self) -> None:
        """The same for whoever cannot raise: at exit the error says nothing, and otherwise comes up in the next call."""
        if self._handle is not None:
            self._cuda.cudaStreamSynchronize(self._handle)

    def captured(self, launches: Callable[[], None], replayed_on: Stream) -> Callable[[], None]:
        """The launches, recorded on this stream, as one CUDA graph for another; other threads may go on loading engines
        meanwhile, hence the capture's mode.

        Raises:
            EngineError: a launch cannot be captured.
        """
        cuda, stream = self._cuda, self._handle
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(cuda, cuda.cudaStreamBeginCapture(stream, mode))
        try:
            launches()
        except BaseException:
            cuda.cudaStreamEndCapture(stream)  # the failed launch is the error to tell
            raise
        (graph,) = check(cuda, cuda.cudaStreamEndCapture(stream))
        try:
            (executable,) = check(cuda, cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        return _Replay(cuda, executable, replayed_on._handle)


class _Replay:
    """A graph that can be launched again and again."""

    def __init__(self, cuda: Any, executable: Any, stream: Any) -> None:
        self._cuda = cuda
        self._executable = executable
        self._stream = stream

    def __call__(self) -> None:
        check(self._cuda, self._cuda.cudaGraphLaunch(self._executable, self._stream))

    def __del__(self) -> None:
        self._cuda.cudaGraphExecDestroy(self._executable)
