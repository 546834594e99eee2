"""Stand-ins for the CUDA runtime and for TensorRT, as far as a backend asks them: memory is numpy's, engines are functions.

They keep the rules that would bite on a GPU: calls on freed memory fail, a stream's work is done when it is waited for, work
recorded in a graph is not done, a capture is lost where its thread asks for memory or gives it back meanwhile, a context
computes with the shapes and addresses that it was last given, a run is several kernels, which hand each other what they compute
in the memory that was set for it, and while they compute their context must not be changed, launched on another stream or let
go of.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, OUT_OF_MEMORY, OLD_DRIVER, BAD_CAPTURE = 0, 2, 35, 900


class FakeCuda:
    """`cuda.bindings.runtime` on one GPU of `room` bytes."""

    # CUDA's names.
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaEventDisableTiming = 2  # noqa: N815
    cudaMemcpyKind = IntEnum(  # noqa: N815
        "cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2, "cudaMemcpyDeviceToDevice": 3}
    )
    cudaError_t = IntEnum("cudaError_t", {"cudaErrorNoDevice": 100})  # noqa: N815
    cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})  # noqa: N815

    def __init__(self, room: int = 1 << 20, capability: tuple[int, int] = (8, 9), devices: int = 1) -> None:
        self.room, self.capability, self.devices = room, capability, devices
        self.driver = 13010 if devices else 0
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.recording: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.pinned: dict[int, np.ndarray[Any, Any]] = {}
        self.events: dict[int, bool] = {}
        self.capturing: set[int] = set()
        self.captures_fail = False
        self.launched_graphs = self.made = 0

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:  # noqa: N802  # CUDA's names, here and below
        """Without a driver CUDA says the same as with one that is too old."""
        return (SUCCESS, self.devices) if self.devices and self.driver >= 13000 else (OLD_DRIVER, None)

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, self.driver

    def cudaGetDevice(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, 0

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:  # noqa: N802
        major, minor = self.capability
        return SUCCESS, SimpleNamespace(name=b"NVIDIA Fake\0\0", major=major, minor=minor)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return SUCCESS, self.room - self.used, self.room

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        said = {OUT_OF_MEMORY: b"out of memory", OLD_DRIVER: b"CUDA driver version is insufficient for CUDA runtime version"}
        return SUCCESS, said.get(status, b"something else")

    @property
    def used(self) -> int:
        return sum(array.nbytes for array in self.memory.values())

    def _spoils_a_capture(self) -> bool:
        if threading.get_ident() in self.capturing:
            self.captures_fail = True
        return threading.get_ident() in self.capturing

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        if self._spoils_a_capture():
            return BAD_CAPTURE, 0
        if self.used + size > self.room:
            return OUT_OF_MEMORY, 0
        array = np.full(size, 0xAB, np.uint8)
        self.memory[array.ctypes.data] = array
        return SUCCESS, array.ctypes.data

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        if self._spoils_a_capture():
            return (BAD_CAPTURE,)
        del self.memory[address]
        return (SUCCESS,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.made += 1
        handle = 100 + self.made
        self.queues[handle] = []
        return SUCCESS, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        del self.queues[stream]
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        for address in {1: [target], 2: [source], 3: [source, target]}[kind]:
            start = max(base for base in self.memory if base <= address)
            assert address + size <= start + self.memory[start].nbytes, "past the end"
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))  # CUDA does not say when it reads the host's memory
        return (SUCCESS,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        start = max(base for base in self.memory if base <= target)
        assert target + size <= start + self.memory[start].nbytes, "past the end"
        self.enqueue(stream, lambda: ctypes.memset(target, value, size))
        return (SUCCESS,)

    def cudaMallocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        array = np.full(size, 0xCD, np.uint8)
        self.pinned[array.ctypes.data] = array
        return SUCCESS, array.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        del self.pinned[address]
        return (SUCCESS,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        self.events[handle := 5000 + len(self.events)] = True
        return SUCCESS, handle

    def cudaEventDestroy(self, event: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[int]:  # noqa: N802
        self.events[event] = False
        self.enqueue(stream, lambda: self.events.update({event: True}))
        return (SUCCESS,)

    def cudaEventSynchronize(self, event: int) -> tuple[int]:  # noqa: N802
        """Only what was asked for before the event is done."""
        for queue in self.queues.values():
            while queue and not self.events[event]:
                queue.pop(0)()
        assert self.events[event]
        return (SUCCESS,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        work, self.queues[stream] = self.queues[stream], []
        for each in work:
            each()
        return (SUCCESS,)

    def enqueue(self, stream: int, work: Callable[[], Any]) -> None:
        self.recording.get(stream, self.queues[stream]).append(work)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        assert stream not in self.recording
        self.recording[stream] = []
        self.capturing.add(threading.get_ident())
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, int]:  # noqa: N802
        work = self.recording.pop(stream)
        self.capturing.remove(threading.get_ident())
        if self.captures_fail:
            return BAD_CAPTURE, 0
        handle = 1000 + len(self.graphs)
        self.graphs[handle] = work
        return SUCCESS, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, graph

    def cudaGraphDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[int]:  # noqa: N802
        self.launched_graphs += 1
        for work in self.graphs[graph]:
            self.enqueue(stream, work)
        return (SUCCESS,)

    def array_at(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.memory[address][:size].view(dtype).reshape(shape)


Tensors = Mapping[str, tuple[bool, str, tuple[int, ...]]]
"""By name: whether it is an input, its dtype, its shape with -1 where it is dynamic."""


class FakeTrt:
    """The module of TensorRT, or of TensorRT for RTX, with one engine: `compute` gives the outputs of inputs by name."""

    __version__ = "1.7.1.116"
    DataType = IntEnum("DataType", {"FLOAT": 1, "INT64": 2, "HALF": 3})
    TensorIOMode = IntEnum("TensorIOMode", {"INPUT": 1, "OUTPUT": 2})
    ExecutionContextAllocationStrategy = IntEnum("Strategy", {"STATIC": 1, "USER_MANAGED": 2})
    CudaGraphStrategy = IntEnum("CudaGraphStrategy", {"DISABLED": 1, "WHOLE_GRAPH_CAPTURE": 2})
    DynamicShapesKernelSpecializationStrategy = IntEnum("Specialization", {"LAZY": 1, "EAGER": 2, "NONE": 3})
    EngineValidity = IntEnum("EngineValidity", {"VALID": 1, "INVALID": 2})
    EngineInvalidityDiagnostics = IntEnum("Diagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4})
    SCRATCH = 512

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    def __init__(
        self, cuda: FakeCuda, tensors: Tensors, compute: Callable[[dict[str, Any]], dict[str, Any]], diagnostics: int = 0
    ) -> None:
        self.cuda, self.tensors, self.compute, self.diagnostics = cuda, tensors, compute, diagnostics
        self.contexts: list[Any] = []
        self.between_kernels: Callable[[], None] = lambda: None
        """What other threads do meanwhile: a launch lets go of the interpreter's lock."""
        self.broken_rules: list[str] = []
        """Those that are broken where nothing can be raised."""
        self.refused: set[str] = set()
        self.kept = b"kernels"

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        runtime = SimpleNamespace(engine_header_size=4)

        def validity(header: Any) -> tuple[Any, int]:
            if self.diagnostics:
                log.log(self.ILogger.ERROR, "what the library\n found")
            return self.EngineValidity(2 if self.diagnostics else 1), self.diagnostics

        runtime.get_engine_validity = validity

        def deserialize(data: Any) -> Any:
            if bytes(data[:4]) != b"plan":
                log.log(self.ILogger.ERROR, "magic tag\n does not match")
                return None
            return FakeEngine(self)

        runtime.deserialize_cuda_engine = deserialize
        return runtime


class FakeEngine:
    """The library's engine."""

    def __init__(self, trt: FakeTrt) -> None:
        self._trt = trt
        self._names = list(trt.tensors)
        self._kernels: Any = None
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return {"float32": self._trt.DataType.FLOAT, "int64": self._trt.DataType.INT64}[self._trt.tensors[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._trt.tensors[name][2]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if self._trt.tensors[name][0] else self._trt.TensorIOMode.OUTPUT

    def create_runtime_config(self) -> Any:
        trt = self._trt
        return SimpleNamespace(
            create_runtime_cache=lambda: FakeKernels(trt.kept),
            set_runtime_cache=lambda cache: setattr(self, "_kernels", weakref.ref(cache)) is None,
            dynamic_shapes_kernel_specialization_strategy=trt.DynamicShapesKernelSpecializationStrategy.LAZY,
            set_execution_context_allocation_strategy=lambda strategy: None,
        )

    def create_execution_context(self, how: Any) -> Any:
        context = FakeContext(self._trt, how, self._kernels)
        self._trt.contexts.append(context)
        return context


class FakeKernels:
    """The library's cache of compiled kernels, which has to outlive the contexts that it was given to. What an eager context
    runs is in it at once; a lazy one compiles in the background, and has slower kernels meanwhile."""

    def __init__(self, kept: bytes) -> None:
        self._kept = kept
        self.compiled = b""

    def deserialize(self, blob: bytes) -> bool:
        if blob == self._kept:
            self.compiled = blob
        return blob == self._kept

    def serialize(self) -> bytes:
        return self.compiled


class FakeContext:
    """The library's execution context."""

    def __init__(self, trt: FakeTrt, how: Any, kernels: Any = None) -> None:
        self._trt, self.how, self._kernels = trt, how, kernels
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.profile: int | None = None
        self.launches = 0

    def streams(self) -> set[int]:
        """Those on which a run is not over."""
        work = ((stream, each) for stream, queue in self._trt.cuda.queues.items() for each in queue)
        return {stream for stream, each in work if id(self) in (getattr(each, "__defaults__", None) or ())}

    def __del__(self) -> None:
        if self.streams():
            self._trt.broken_rules.append("a context went while a run of it was under way")
        if self._kernels is not None and self._kernels() is None:
            self._trt.broken_rules.append("the cache of kernels went before a context that it was given to")

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        assert not self.streams(), "a run is under way"
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.streams(), "a run is under way"
        self.shapes[name] = shape
        return name not in self._trt.refused

    def infer_shapes(self) -> list[str]:
        return [name for name, (is_input, _, _) in self._trt.tensors.items() if is_input and name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {
            each: np.zeros(self.shapes[each], dtype) for each, (is_input, dtype, _) in self._trt.tensors.items() if is_input
        }
        shape: tuple[int, ...] = self._trt.compute(zeros)[name].shape
        return shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert not self.streams(), "a run is under way"
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return self._trt.SCRATCH * self.shapes[next(iter(self.shapes))][0]

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        cuda, trt, addresses, shapes = self._trt.cuda, self._trt, dict(self.addresses), dict(self.shapes)
        scratch, size = self.scratch[0], self.update_device_memory_size_for_shapes()
        assert cuda.memory[scratch].nbytes >= size
        assert self.streams() <= {stream}, "a run is under way on another stream"
        if self._kernels is not None and self.how.dynamic_shapes_kernel_specialization_strategy.name == "EAGER":
            self._kernels().compiled = trt.kept
        self.launches += 1

        (name,) = (name for name, (is_input, _, _) in trt.tensors.items() if not is_input)
        shape, dtype = self.get_tensor_shape(name), trt.tensors[name][1]

        def compute(of: int = id(self)) -> None:
            inputs = {name: cuda.array_at(addresses[name], shape, trt.tensors[name][1]) for name, shape in shapes.items()}
            cuda.array_at(scratch, shape, dtype)[...] = trt.compute(inputs)[name]

        def give(of: int = id(self)) -> None:
            cuda.array_at(addresses[name], shape, dtype)[...] = cuda.array_at(scratch, shape, dtype)

        cuda.enqueue(stream, compute)
        trt.between_kernels()
        cuda.enqueue(stream, give)
        return "run" not in trt.refused
