"""An execution context of TensorRT's tied to its shapes, its buffers and its scratch memory, and run by launches or a graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from mc_runtime.backends.base import Buffer, Shapes
from mc_runtime.backends.cuda import Memory, Stream
from mc_runtime.backends.trt_libraries import TrtLibrary
from mc_runtime.errors import EngineError


class Scratch:
    """The memory that runs compute in. One piece for all: they follow each other on one stream, launch behind launch. A context
    keeps the piece it was given, since a graph repeats its addresses; a larger one is made for those that come later.

    Args:
        allocate: gives a piece of a size in bytes.
    """

    def __init__(self, allocate: Callable[[int], Memory]) -> None:
        self._allocate = allocate
        self._memory: Memory | None = None
        self._lock = threading.Lock()

    def at_least(self, size: int) -> Memory:
        """A piece of `size` bytes or more. Raises EngineError where the GPU's memory is full."""
        with self._lock:
            if self._memory is None or self._memory.size < size:
                self._memory = None  # before the larger one is made, so that both need not fit
                self._memory = self._allocate(size)
            return self._memory


class Context:
    """One execution context. TensorRT forbids to change it or to let go of it while a run of it is under way, and it may use
    its cache of kernels as long as it lives.

    Args:
        trt: the library's module.
        library: which of the two it is.
        engine: the library's engine.
        stream: where it runs.
        graphs: it is going to run many times on the same buffers.
        kernels: the cache of compiled kernels, where the library has one.
        at_once: a run waits for the kernels of its shapes, where the library would run slower ones while it compiles them.
    """

    def __init__(
        self,
        trt: Any,
        library: TrtLibrary,
        engine: Any,
        stream: Stream,
        *,
        graphs: bool = False,
        kernels: Any | None = None,
        at_once: bool = False,
    ) -> None:
        self._stream = stream
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if library.captures_graphs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            wanted = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else trt.CudaGraphStrategy.DISABLED
            config.cuda_graph_strategy = wanted
            if at_once:
                config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if kernels is not None:
                config.set_runtime_cache(kernels)
            self._native = engine.create_execution_context(config)
        else:
            self._native = engine.create_execution_context(strategy)
        if self._native is None:
            raise EngineError("the library makes no execution context")
        self._kernels = kernels
        self._profile: int | None = None
        self._memory: Memory | None = None
        self._is_launched = False

    def __del__(self) -> None:
        if getattr(self, "_is_launched", False):
            self._stream.settle()
        self._native = None  # before its kernels and its memory

    def shape(self, profile: int, shapes: Shapes) -> None:
        """Set a profile and the inputs' shapes, once earlier runs are over. Raises EngineError where they are not taken."""
        if self._is_launched:
            self._stream.wait()
        if profile != self._profile:
            _done(self._native.set_optimization_profile_async(profile, self._stream.handle), f"profile {profile}")
            self._profile = profile
        for name, shape in shapes.items():
            _done(self._native.set_input_shape(name, tuple(shape)), f"{name} of shape {list(shape)}")
        unclear = self._native.infer_shapes()
        if unclear:
            raise EngineError(f"the shapes of {', '.join(unclear)} stay unknown")

    def shape_of(self, name: str) -> tuple[int, ...]:
        """An output's shape, once the inputs' are set. Raises EngineError where it depends on more than shapes."""
        shape = tuple(int(size) for size in self._native.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise EngineError(f"the shape of {name} depends on the inputs' values")
        return shape

    def address(self, buffers: Mapping[str, Buffer], scratch: Scratch) -> None:
        """Tie every tensor to a buffer, and the context to memory to compute in. Shapes must be set."""
        for name, buffer in buffers.items():
            _done(self._native.set_tensor_address(name, buffer.native.address), f"the address of {name}")
        self._memory = scratch.at_least(int(self._native.update_device_memory_size_for_shapes()))
        self._native.set_device_memory(self._memory.address, self._memory.size)

    def launch(self, stream: Stream | None = None) -> None:
        """Ask for a run, on the context's stream if none is named. Raises EngineError where it cannot be asked for."""
        self._is_launched = True
        _done(self._native.execute_async_v3((stream or self._stream).handle), "a run")


class Bound:
    """A context on fixed buffers, run again and again: launched at first, then captured once and replayed.

    A library that captures graphs itself is only launched. A capture that fails costs speed, which a warning says.

    Args:
        context: shaped and addressed.
        capture: records launches on a stream of its own and gives what replays them; None to always launch.
    """

    def __init__(self, context: Context, capture: Callable[[Callable[[Stream], None]], Callable[[], None]] | None) -> None:
        self._context = context
        self._capture = capture
        self._replay: Callable[[], None] | None = None
        self._is_warm = False

    def run(self) -> None:
        """One run. Raises EngineError."""
        if self._replay is not None:
            self._replay()
        elif self._is_warm and self._capture is not None:
            try:
                self._replay = self._capture(self._context.launch)
            except EngineError as error:
                self._capture = None
                what = f"steps are launched kernel by kernel, without a CUDA graph: {error}"
                warnings.warn(what, RuntimeWarning, stacklevel=4)
                self._context.launch()
            else:
                self._replay()
        else:
            self._context.launch()
            self._is_warm = True


def _done(accepted: bool, what: str) -> None:
    if not accepted:
        raise EngineError(f"the library refuses {what}")
