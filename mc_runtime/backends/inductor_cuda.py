"""Packages of AOTInductor on an NVIDIA GPU: buffers stay on it, and a step is replayed as one CUDA graph.

Not run on a GPU yet. What needs none is tested: buffers, graph keys and fallback in `mc_runtime.backends.cuda_graphs`, checks
in `mc_runtime.backends.gpu`, the loop that runs ahead in `mc_runtime.runtime.denoise`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file

from mc_runtime.backends.base import Array, Buffer, Call, Engine, Settings, Shapes
from mc_runtime.backends.cuda_graphs import GraphCache, Launches, graph_key, in_order
from mc_runtime.backends.device_buffers import PooledBackend
from mc_runtime.backends.gpu import Gpu, check_gpu, check_run, check_weights, gpu_mend
from mc_runtime.backends.packages import METADATA_KEY, Package, check_shapes, signature_described
from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.dimensions import extents_in
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import EngineError

_DTYPES = {"float32": torch.float32, "int64": torch.int64}
_ALIGNMENT = 16
_serials = itertools.count()
_INSTEAD = "or build the bundle for another target, such as --target onnxruntime"


def this_gpu() -> Gpu | None:
    """The GPU that torch would use, or None where it sees none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return Gpu(properties.name, (properties.major, properties.minor), free + unused)


class InductorCudaBackend(PooledBackend):
    """Engine options: see `mc_runtime.backends.packages.Package`.

    Raises:
        EngineError: torch sees no GPU.
    """

    name = "inductor-cuda"
    ahead = 1  # the GPU has its next step while the host hears of the last one
    keeps = True
    looks_there = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if this_gpu() is None:
            why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
            raise EngineError(f"this bundle's engines run on an NVIDIA GPU, and {why}; use a machine with one, {_INSTEAD}")
        self._loading = threading.Lock()
        self.graphs = GraphCache(Graphs())

    def admit(self, engines: Mapping[str, EngineSpec]) -> None:
        """See `Backend.admit`; the message says how much memory all of them need."""
        gpu = this_gpu()
        assert gpu is not None  # or this backend would not be
        check_weights({name: Package.of(name, spec) for name, spec in engines.items()}, gpu)

    def load(self, component: str, files: tuple[Path, ...], spec: EngineSpec) -> Engine:
        """See `Backend.load`. Raises BundleError for a package of another torch or another GPU."""
        package = Package.of(component, spec)
        package.check_torch(files[0], torch.__version__)
        with self._loading:  # one engine's weights after another, so that what is free is what this one can have
            gpu = this_gpu()
            check_gpu(package, files[0], gpu)
            assert gpu is not None
            check_weights({component: package}, gpu)
            return InductorCudaEngine(component, files, spec, package, self)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See `PooledBackend.allocate`."""
        try:
            return torch.empty(shape, dtype=_DTYPES[dtype], device="cuda")
        except RuntimeError as error:
            raise EngineError(gpu_mend(" ".join(str(error).split())[:300])) from error

    def write(self, buffer: Buffer, array: Array) -> None:
        """See `Backend.write`; in the order of the launches, so a run under way still reads what was there."""
        if array.shape != buffer.shape:
            array = np.broadcast_to(array, buffer.shape)
        buffer.native.copy_(_on_the_host(array, buffer.dtype))

    def rows(self, pieces: Sequence[Array | Resident], shape: tuple[int, ...]) -> Buffer:
        """See `Backend.rows`; pieces that are on this GPU are copied there, in the order of the launches."""
        buffer = self.empty(shape)
        for place, piece in zip(buffer.native.view(-1, *shape[-2:]), pieces, strict=True):
            if isinstance(piece, Resident) and piece.backend is self:
                numbers = piece.buffer.native.reshape(-1)[piece.start : piece.start + piece.size].view(piece.shape)
            else:
                numbers = _on_the_host(np.asarray(piece), buffer.dtype)
            place[: len(piece)].copy_(numbers)
            place[len(piece) :] = 0
        return buffer

    def table(self, rows: Array) -> Buffer:
        """See `Backend.table`; on the GPU."""
        return self.to_device(rows)

    def select(self, buffer: Buffer, table: Buffer, index: int) -> None:
        """See `Backend.select`; in the order of the launches."""
        buffer.native.copy_(table.native[index])

    def to_host(self, buffer: Buffer) -> Array:
        """See `Backend.to_host`; a copy, which waits for the launches before it."""
        found: Array = buffer.native.cpu().numpy()
        return found

    def is_finite(self, buffer: Buffer) -> bool:
        """See `Backend.is_finite`; counted on the GPU, one byte comes back."""
        return bool(torch.isfinite(buffer.native).all())

    def ask_finite(self, buffer: Buffer) -> Callable[[], bool]:
        """See `Backend.ask_finite`; the answer waits for its own byte and not for what was launched since."""
        found = torch.empty((), dtype=torch.bool, pin_memory=True)
        found.copy_(torch.isfinite(buffer.native).all(), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def answer() -> bool:
            arrived.synchronize()
            return bool(found)

        return answer


class InductorCudaEngine(Engine):
    """One package with its weights on the GPU."""

    def __init__(
        self, name: str, files: tuple[Path, ...], spec: EngineSpec, package: Package, backend: InductorCudaBackend
    ) -> None:
        super().__init__(name, files[0])
        self.spec = spec
        self._package = package
        self._backend = backend
        self.serial = next(_serials)
        try:
            # Single-threaded: the runner then makes no stream or event of its own, which a capture could not hold.
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(files[0]), "model", True, 1, -1)
            self._weights: dict[str, Any] = {}
            for file in files[1:]:
                self._weights |= {name: _aligned(tensor) for name, tensor in load_file(str(file), device="cuda").items()}
            if self._weights:
                self._loader.load_constants(self._weights, False, True, True)
            self._signature = signature_described(self._loader.get_metadata()[METADATA_KEY])
        except Exception as error:  # torch, safetensors, CUDA and the dynamic linker each have their own
            self.fail("does not load", error)

    def describe(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `Engine.describe`."""
        return self._signature

    def prepare(self, shapes: Shapes) -> None:
        """See `Engine.prepare`; whether there is memory for such a run is said before it begins."""
        extents: dict[str, int] = {}
        for tensor in self.spec.inputs:
            if tensor.name in shapes:
                extents |= extents_in(tensor.shape, shapes[tensor.name])
        gpu = this_gpu()
        assert gpu is not None
        check_run(self.name, self._package, extents, gpu)

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        self._check(inputs)
        return _GraphCall(self, self._backend.graphs, inputs, outputs)

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`; without a graph, since no other run has these buffers."""
        self._check(inputs)
        results = self.compute([inputs[tensor.name].native for tensor in self.spec.inputs])
        return {
            tensor.name: Buffer(result, tuple(result.shape), np.dtype(tensor.dtype))
            for tensor, result in zip(self.spec.outputs, results, strict=True)
        }

    def compute(self, tensors: list[Any]) -> list[Any]:
        """Outputs in the signature's order from inputs in its order, on the current stream."""
        try:
            results: list[Any] = self._loader.run(tensors)
        except Exception as error:
            self.fail("failed", error)
        return results

    def fail(self, what: str, error: Exception) -> NoReturn:
        """See `Engine.fail`; what CUDA says is said with its mend."""
        super().fail(what, RuntimeError(gpu_mend(str(error))).with_traceback(error.__traceback__))

    def _check(self, inputs: Mapping[str, Buffer]) -> None:
        found = {name: (buffer.shape, str(buffer.dtype)) for name, buffer in inputs.items()}
        check_shapes(self.name, self.spec, self._package, found)


class _GraphCall(Call):
    """An engine on fixed buffers: its graph reads the inputs' memory and writes the outputs'."""

    def __init__(
        self, engine: InductorCudaEngine, graphs: GraphCache, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> None:
        spec = engine.spec
        self._engine = engine
        self._graphs = graphs
        self._inputs = in_order([tensor.name for tensor in spec.inputs], inputs, f"{engine.name} engine's inputs")
        self._outputs = in_order([tensor.name for tensor in spec.outputs], outputs, f"{engine.name} engine's outputs")
        self._key = graph_key(engine.serial, [*self._inputs, *self._outputs], lambda tensor: int(tensor.data_ptr()))

    def run(self) -> None:
        try:
            self._graphs.run(self._key, self._launch)
        except RuntimeError as error:  # CUDA's own; an EngineError passes
            self._engine.fail("failed", error)

    def _launch(self) -> None:
        results = self._engine.compute([buffer.native for buffer in self._inputs])
        for buffer, result in zip(self._outputs, results, strict=True):
            buffer.native.copy_(result)


def _on_the_host(array: Array, dtype: np.dtype[Any]) -> Any:
    """The array as torch's; copied only where it must be."""
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


def _aligned(tensor: Any) -> Any:
    """The tensor where vectors of 16 bytes can be loaded from: compiled kernels take that for granted of every weight, and in a
    file one follows the other without a gap."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


class Graphs:
    """CUDA graphs that are captured on one stream of their own and share one pool of memory.

    They are warmed up on that stream, too: libraries keep workspaces by stream. One pool serves all graphs because none of
    them leaves a result in it (they end in copies to buffers outside) and no two run at once (`GraphCache` replays one after
    another, on one stream); with a pool each, every bucket would hold a whole step's activations, twice.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, launches: Launches) -> None:
        """See `Recorder.warm_up`."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            launches()
        here.wait_stream(self._stream)

    def capture(self, launches: Launches) -> Launches:
        """See `Recorder.capture`. Other threads may go on loading engines meanwhile, hence the capture's mode."""
        graph = torch.cuda.CUDAGraph()
        # The outer one is for a capture that fails: torch's own does not leave its stream where it cannot be ended.
        with torch.cuda.stream(self._stream):
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    launches()
            except BaseException:
                self._give_up()
                raise
        replay: Launches = graph.replay
        return replay

    def _give_up(self) -> None:
        """Does what torch leaves undone where a capture cannot be ended: its allocator goes on as inside it, and then refuses
        every later capture, and to give back memory."""
        device = torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, self._pool)
        except RuntimeError:  # it is done: what failed came later
            return
        torch._C._cuda_releasePool(device, self._pool)
