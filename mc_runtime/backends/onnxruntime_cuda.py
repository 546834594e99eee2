"""onnxruntime on an NVIDIA GPU: the same files as on the CPU, tensors that stay on the GPU, a step as one CUDA graph.

Not run on a GPU yet. Everything but the provider is tested on the CPU's: buffers, binding, swapped buffers, graph numbers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mc_runtime.backends.base import Array, Buffer, Call, Engine, Settings
from mc_runtime.backends.cuda_graphs import KEPT_GRAPHS, Calls, graph_key, in_order
from mc_runtime.backends.device_buffers import PooledBackend
from mc_runtime.backends.gpu import gpu_mend
from mc_runtime.backends.onnxruntime import SessionEngine, session_options
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.errors import EngineError

_PROVIDER = "CUDAExecutionProvider"
_GRAPH = "gpu_graph_id"
_NO_GRAPH = "-1"  # onnxruntime's number for a run that is neither captured nor replayed
# It captures in CUDA's global mode: memory, copies and synchronisation that another thread asks for meanwhile fail, and so does
# the capture.
_calls = Calls()


@dataclass(frozen=True)
class Place:
    """Where engines run: onnxruntime's name of the device, its providers, and whether they capture CUDA graphs."""

    device: str
    providers: tuple[Any, ...]
    graphs: bool

    def without_graphs(self) -> Place:
        """The same place for an engine that cannot be captured."""
        plain = tuple(_uncaptured(provider) for provider in self.providers)
        return Place(self.device, plain, graphs=False)


def _uncaptured(provider: Any) -> Any:
    if isinstance(provider, str):
        return provider
    name, options = provider
    return name, {key: value for key, value in options.items() if key != "enable_cuda_graph"}


# TF32 keeps 10 bits of 23: an fp32 engine would not have the error that the manifest promises.
CUDA = Place("cuda", ((_PROVIDER, {"enable_cuda_graph": "1", "use_tf32": "0"}), "CPUExecutionProvider"), graphs=True)


class OnnxRuntimeCudaBackend(PooledBackend):
    """Engine options: see `mc_runtime.backends.onnxruntime.OnnxRuntimeBackend`.

    Raises:
        EngineError: this onnxruntime is built without CUDA.
    """

    name = "onnxruntime"
    asks_every_step = False  # onnxruntime copies to the host only by waiting for everything

    def __init__(self, settings: Settings, place: Place = CUDA) -> None:
        super().__init__(settings)
        if place is CUDA and _PROVIDER not in ort.get_available_providers():
            raise EngineError(
                "device cuda: this onnxruntime is built without CUDA; pip uninstall onnxruntime && pip install "
                "'mc-runtime[gpu]', or ask for the device cpu"
            )
        self.place = place
        if place is CUDA and hasattr(ort, "preload_dlls"):
            with redirect_stdout(sys.stderr):
                ort.preload_dlls()  # those that pip installs lie where no linker looks

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`."""
        return OnnxRuntimeCudaEngine(component, files[0], spec, session_options(component, spec, self.settings), self)

    def write(self, buffer: Buffer, array: Array) -> None:
        """See `Backend.write`."""
        numbers = np.require(np.broadcast_to(array, buffer.shape), buffer.dtype, ["C"])
        with _calls.beside_others():
            buffer.native.update_inplace(numbers)

    def to_host(self, buffer: Buffer) -> Array:
        """See `Backend.to_host`; a copy."""
        with _calls.beside_others():
            found: Array = np.array(buffer.native.numpy())
        return found

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `PooledBackend.allocate`."""
        try:
            with _calls.beside_others():
                return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, self.place.device, 0)
        except Exception as error:  # onnxruntime raises its own types, one a status code
            raise EngineError(gpu_mend(" ".join(str(error).split())[:300])) from error


class GraphNumbers:
    """Numbers for onnxruntime's graphs, by what they are captured on. It never frees one, so only so many are given out; later
    ones run without."""

    def __init__(self, most: int = KEPT_GRAPHS) -> None:
        self._most = most
        self._numbers: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def number(self, key: Hashable) -> str:
        """The number of a key, as a run's option takes it."""
        with self._lock:
            if key not in self._numbers and len(self._numbers) < self._most:
                self._numbers[key] = 1 + len(self._numbers)
            return str(self._numbers.get(key, _NO_GRAPH))


class OnnxRuntimeCudaEngine(SessionEngine):
    """A session on the GPU."""

    def __init__(self, name: str, path: Path, spec: EngineSpec, options: Any, backend: OnnxRuntimeCudaBackend) -> None:
        super().__init__(name, path)
        self.spec = spec
        self._place = backend.place
        self._numbers = GraphNumbers()
        # A graph repeats its addresses, also those of what lies between: two runs must not mix.
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        try:
            with _calls.beside_others():
                self.session = self._session(options)
        except Exception as error:
            self.fail("does not load", error)

    @contextmanager
    def turn(self, graph: str | None) -> Iterator[None]:
        """For one run. The first that a thread makes of a graph captures it: onnxruntime keeps graphs by thread."""
        captured: set[str] = self._of_thread.__dict__.setdefault("graphs", {_NO_GRAPH})
        with self._lock:
            if graph is None or graph in captured:
                with _calls.beside_others():
                    yield
            else:
                with _calls.alone():
                    yield
                captured.add(graph)

    def _session(self, options: Any) -> Any:
        try:
            return self._opened(options)
        except Exception:
            if not self._place.graphs:
                raise
        # An engine with an operator that only the CPU has is refused as a graph; it runs without.
        self._place = self._place.without_graphs()
        return self._opened(options)

    def _opened(self, options: Any) -> Any:
        """The session. onnxruntime's own ways out of a fault end on the CPU, and nobody would know."""
        providers = list(self._place.providers)
        session = ort.InferenceSession(str(self.path), options, providers=providers, enable_fallback=False)
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in session.get_providers():
            raise EngineError(
                f"there is no {wanted}, for want of the CUDA and cuDNN that this onnxruntime is for, or of a driver for them; "
                "pip install 'mc-runtime[gpu]', or ask for the device cpu"
            )
        return session

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        given = in_order([tensor.name for tensor in self.spec.inputs], inputs, f"{self.name} engine's inputs")
        taken = in_order([tensor.name for tensor in self.spec.outputs], outputs, f"{self.name} engine's outputs")
        binding = self.bound(inputs, outputs)
        key = graph_key(id(self), [*given, *taken], lambda value: int(value.data_ptr()))
        number = self._numbers.number(key) if self._place.graphs else None
        return _BoundCall(self, binding, number, (*given, *taken))

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`; the outputs are onnxruntime's own, on the GPU."""
        binding = self.bound(inputs)
        names = [node.name for node in self.session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._place.device)
        _BoundCall(self, binding, _NO_GRAPH if self._place.graphs else None, tuple(inputs.values())).run()
        dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in self.spec.outputs}
        values = zip(names, binding.get_outputs(), strict=True)
        return {name: Buffer(value, tuple(value.shape()), dtypes[name]) for name, value in values}


class _BoundCall(Call):
    def __init__(self, engine: OnnxRuntimeCudaEngine, binding: Any, graph: str | None, buffers: tuple[Buffer, ...]) -> None:
        self._engine = engine
        self._binding = binding
        self._buffers = buffers  # their memory lives as long as the call
        self._graph = graph
        self._options = ort.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry(_GRAPH, graph)

    def run(self) -> None:
        try:
            with self._engine.turn(self._graph):
                self._engine.session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            self._engine.fail("failed", RuntimeError(gpu_mend(str(error))).with_traceback(error.__traceback__))
