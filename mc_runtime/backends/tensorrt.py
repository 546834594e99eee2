"""TensorRT and TensorRT for RTX: plans on an NVIDIA GPU, buffers that stay on it, a step as one CUDA graph.

Not run on a GPU yet: what needs none (versions, GPUs, profiles, shapes, binding, buffers, graphs) is tested, against
stand-ins of the two libraries where they are asked.
"""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from mc_runtime.backends.base import Array, Buffer, Call, Engine, Settings, Shapes, all_finite
from mc_runtime.backends.cuda import Landing, Memory, Stream, load_cuda, this_gpu
from mc_runtime.backends.cuda_graphs import graph_key, in_order
from mc_runtime.backends.device_buffers import PooledBackend
from mc_runtime.backends.gpu import gpu_mend
from mc_runtime.backends.resident import Resident
from mc_runtime.backends.trt_context import Bound, Context, Scratch
from mc_runtime.backends.trt_kernels import KernelCache
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES, collecting_nothing, make_log
from mc_runtime.backends.trt_plans import TrtPlan, choose_profile, why_invalid
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import EngineError

# Contexts with their graphs that an engine keeps; two serve one bucket, one for either order of the swapped buffers.
_KEPT = 8


class TensorRtBackend(PooledBackend):
    """Engine options: see `mc_runtime.backends.trt_plans.TrtPlan`.

    Raises:
        EngineError: the library or cuda.bindings is not installed, or there is no GPU.
    """

    name: ClassVar[str] = "tensorrt"
    ahead = 1  # the GPU has its next step while the host hears of the last one
    keeps = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.library = TRT_LIBRARIES[self.name]
        self.trt = self.library.load()
        self._cuda = load_cuda()
        if this_gpu(self._cuda) is None:
            raise EngineError(
                f"this bundle's {self.name} engines run on an NVIDIA GPU, and there is none here, or no driver for it; use a "
                "machine with one, or build the bundle for another target"
            )
        self.log = make_log(self.trt)
        with collecting_nothing:
            self.runtime = self.trt.Runtime(self.log)
        self.stream = Stream(self._cuda)
        self._side = Stream(self._cuda)
        # A launch is many kernels, and lets other threads go on between them. All contexts compute in one piece of memory:
        # one's kernels must not come between another's.
        self.turn = threading.Lock()
        self._landings: dict[int, list[Landing]] = {}
        self.scratch = Scratch(lambda size: Memory(self._cuda, size))

    def check(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> None:
        """See `Backend.check`: version, GPU and memory, from the manifest; then the plan's own header."""
        plan = TrtPlan.of(component, spec)
        plan.check_version(files[0], self.name, str(self.trt.__version__))
        plan.check_gpu(files[0], self.name, this_gpu(self._cuda))  # what is free now
        if hasattr(self.runtime, "get_engine_validity"):
            try:
                with files[0].open("rb") as file:
                    header = file.read(self.runtime.engine_header_size)
            except OSError as error:
                raise EngineError(f"{files[0]}: cannot be read ({error.strerror}); copy the bundle again") from None
            validity, diagnostics = self.runtime.get_engine_validity(header)
            if validity == self.trt.EngineValidity.INVALID:
                bits = {name: int(bit) for name, bit in self.trt.EngineInvalidityDiagnostics.__members__.items()}
                said = f" ({self.log.take()})" if self.log.errors else ""
                raise EngineError(f"{files[0]}: {why_invalid(int(diagnostics), bits)}{said}")

    @collecting_nothing
    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`."""
        self.check(component, files, spec)
        return TensorRtEngine(component, files[0], spec, TrtPlan.of(component, spec), self)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `PooledBackend.allocate`."""
        return self.stream.allocate(shape, dtype)

    def write(self, buffer: Buffer, array: Array) -> None:
        """See `Backend.write`; in the order of the runs, so one under way still reads what was there."""
        self.stream.upload(buffer.native, np.require(np.broadcast_to(array, buffer.shape), buffer.dtype, ["C"]))

    def rows(self, pieces: Sequence[Array | Resident], shape: tuple[int, ...]) -> Buffer:
        """See `Backend.rows`; pieces that are on this GPU are copied there, in the order of the runs."""
        buffer = self.empty(shape)
        self.stream.clear(buffer.native)
        width = buffer.dtype.itemsize
        for index, piece in enumerate(pieces):
            at = index * prod(shape[-2:]) * width
            if isinstance(piece, Resident) and piece.backend is self:
                self.stream.copy(buffer.native, piece.buffer.native, piece.nbytes, piece.start * width, at)
            else:
                self.stream.upload(buffer.native, np.require(piece, buffer.dtype, ["C"]), at)
        return buffer

    def table(self, rows: Array) -> Buffer:
        """See `Backend.table`; on the GPU."""
        return self.to_device(rows)

    def select(self, buffer: Buffer, table: Buffer, index: int) -> None:
        """See `Backend.select`; copied on the GPU, in the order of the runs."""
        size = prod(buffer.shape) * buffer.dtype.itemsize
        self.stream.copy(buffer.native, table.native, size, index * size)

    def to_host(self, buffer: Buffer) -> Array:
        """See `Backend.to_host`; a copy, which waits for the runs before it."""
        return self.stream.download(buffer.native, buffer.shape, buffer.dtype)

    def ask_finite(self, buffer: Buffer) -> Callable[[], bool]:
        """See `Backend.ask_finite`; the numbers are copied out while the next run computes, and looked at by the host."""
        size = prod(buffer.shape) * buffer.dtype.itemsize
        free = self._landings.setdefault(size, [])
        landing = free.pop() if free else Landing(self._cuda, size)
        self.stream.begin_download(buffer.native, landing)

        def answer() -> bool:
            finite = all_finite(landing.array(buffer.shape, buffer.dtype))
            free.append(landing)
            return finite

        return answer

    def captured(self, launch: Callable[[Stream], None]) -> Callable[[], None]:
        """A launch as a graph that is replayed on the backend's stream. It is recorded on another: copies that other threads
        ask for meanwhile must not get into it. It is the caller's turn."""
        self.stream.wait()  # a context must not be launched on two streams at once
        collecting_nothing.begin()  # memory that the collector gave back meanwhile would be lost, and the graph with it
        try:
            return self._side.captured(lambda: launch(self._side), replayed_on=self.stream)
        except EngineError as error:
            raise EngineError(f"{error}: {self.log.take()}" if self.log.errors else str(error)) from error
        finally:
            collecting_nothing.end()


class TensorRtRtxBackend(TensorRtBackend):
    """The same with the other library; see `mc_runtime.backends.trt_libraries` for what differs."""

    name: ClassVar[str] = "tensorrt-rtx"


class TensorRtEngine(Engine):
    """One plan, its weights on the GPU."""

    def __init__(self, name: str, path: Path, spec: EngineSpec, plan: TrtPlan, backend: TensorRtBackend) -> None:
        super().__init__(name, path)
        self.spec = spec
        self._plan = plan
        self._backend = backend
        self._bound: OrderedDict[Hashable, Bound] = OrderedDict()
        self._prepared: set[Hashable] = set()
        self._lock = threading.Lock()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._native = backend.runtime.deserialize_cuda_engine(data)
            if self._native is None:
                raise EngineError(backend.log.take())
            self._kernels = KernelCache.of(backend.library, self._native, backend.settings.cache_dir, name)
            self._loose = self._context()
        except Exception as error:  # the library, CUDA and the file system each have their own
            self.fail("does not load", error)

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        trt, native = self._backend.trt, self._native
        dtypes = {trt.DataType.FLOAT: "float32", trt.DataType.INT64: "int64"}
        found: dict[Any, list[Tensor]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
        for index in range(native.num_io_tensors):
            name = native.get_tensor_name(index)
            dtype = native.get_tensor_dtype(name)
            shape = tuple("?" if size < 0 else int(size) for size in native.get_tensor_shape(name))
            found[native.get_tensor_mode(name)].append(Tensor(name=name, dtype=dtypes.get(dtype, str(dtype)), shape=shape))  # type: ignore[arg-type]
        return tuple(found[trt.TensorIOMode.INPUT]), tuple(found[trt.TensorIOMode.OUTPUT])

    def prepare(self, shapes: Shapes) -> None:
        """See `Engine.prepare`: one run on zeros: kernels that the library leaves to the GPU at hand are compiled then, all
        before they are kept, and other contexts find them in the cache."""
        key = tuple(sorted(shapes.items()))
        if key in self._prepared:
            return
        zeros = {
            tensor.name: self._backend.to_device(np.zeros(shapes[tensor.name], tensor.dtype))
            for tensor in self.spec.inputs
            if tensor.name in shapes
        }
        try:
            context = self._context(at_once=True) if self._backend.library.captures_graphs else self._loose
        except Exception as error:
            self.fail("does not get ready", error)
        self._run(context, zeros)
        self._backend.stream.wait()
        self._kernels.save()
        self._prepared.add(key)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        names = [tensor.name for tensor in self.spec.inputs]
        given = in_order(names, inputs, f"{self.name} engine's inputs")
        taken = in_order([tensor.name for tensor in self.spec.outputs], outputs, f"{self.name} engine's outputs")
        key = graph_key(id(self), [*given, *taken], lambda memory: int(memory.address))
        with self._lock:
            if key not in self._bound:
                self._bound[key] = self._newly_bound(inputs, outputs)
            self._bound.move_to_end(key)
            while len(self._bound) > _KEPT:
                self._bound.popitem(last=False)
            return _BoundCall(self, self._bound[key], (*given, *taken))

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`; without a graph, since no other run has these buffers."""
        return self._run(self._loose, inputs)

    def run_bound(self, bound: Bound) -> None:
        """One run of a bound context. Raises EngineError."""
        try:
            with self._backend.turn:
                bound.run()
        except Exception as error:
            self.fail("failed", error)

    def fail(self, what: str, error: Exception) -> NoReturn:
        """See `Engine.fail`; with what the library logged, and the mend of what CUDA says."""
        said = self._backend.log.take() if self._backend.log.errors else ""
        reason = gpu_mend(f"{error}: {said}" if said and said != str(error) else str(error))
        super().fail(what, RuntimeError(reason).with_traceback(error.__traceback__))

    def _run(self, context: Context, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        profile = choose_profile(self.name, self.spec, self._plan, shapes)
        try:
            with self._lock:
                context.shape(profile, shapes)
                outputs = {
                    tensor.name: self._backend.empty(context.shape_of(tensor.name), tensor.dtype)
                    for tensor in self.spec.outputs
                }
                context.address({**inputs, **outputs}, self._backend.scratch)
                with self._backend.turn:
                    context.launch()
        except Exception as error:
            self.fail("failed", error)
        return outputs

    def _newly_bound(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Bound:
        shapes = {name: buffer.shape for name, buffer in inputs.items()}
        profile = choose_profile(self.name, self.spec, self._plan, shapes)
        try:
            context = self._context(graphs=True)
            context.shape(profile, shapes)
            for name, buffer in outputs.items():
                if context.shape_of(name) != buffer.shape:
                    raise EngineError(f"its output {name} is {list(context.shape_of(name))}, bound to {list(buffer.shape)}")
            context.address({**inputs, **outputs}, self._backend.scratch)
        except Exception as error:
            self.fail("does not take its buffers", error)
        return Bound(context, None if self._backend.library.captures_graphs else self._backend.captured)

    def _context(self, *, graphs: bool = False, at_once: bool = False) -> Context:
        backend, kernels = self._backend, self._kernels.native
        return Context(
            backend.trt, backend.library, self._native, backend.stream, graphs=graphs, kernels=kernels, at_once=at_once
        )


class _BoundCall(Call):
    def __init__(self, engine: TensorRtEngine, bound: Bound, buffers: tuple[Buffer, ...]) -> None:
        self._engine = engine
        self._bound = bound
        self._buffers = buffers  # their memory lives as long as the call

    def run(self) -> None:
        self._engine.run_bound(self._bound)
