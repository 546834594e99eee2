"""The CUDA backend where there is no GPU: its tensors lie on the CPU here, and its library and graphs are fakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mc_runtime.backends import inductor_cuda  # noqa: E402
from mc_runtime.backends.base import Buffer, Settings  # noqa: E402
from mc_runtime.backends.gpu import Gpu  # noqa: E402
from mc_runtime.backends.packages import METADATA_KEY, described_signature  # noqa: E402
from mc_runtime.backends.resident import Resident  # noqa: E402
from mc_runtime.bundle.manifest import Engine, Precision, Tensor  # noqa: E402
from mc_runtime.errors import BundleError, EngineError  # noqa: E402
from tests.runtime.rows_of_pieces import check_rows  # noqa: E402

GIB = 2**30
H200 = Gpu("NVIDIA H200", (9, 0), 100 * GIB)
INPUTS = (Tensor(name="sample", dtype="float32", shape=("B", 2)), Tensor(name="scale", dtype="float32", shape=("B",)))
OUTPUTS = (Tensor(name="next_sample", dtype="float32", shape=("B", 2)),)
FILES = (Path("step.pt2"), Path("step.safetensors"))


class FakeLibrary:
    """Multiplies, and gives the result in memory of its own, as a package does."""

    def __init__(self, *arguments: Any) -> None:
        self.weights: dict[str, Any] = {}

    def load_constants(self, weights: dict[str, Any], *flags: bool) -> None:
        self.weights = weights

    def get_metadata(self) -> dict[str, str]:
        return {METADATA_KEY: described_signature(INPUTS, OUTPUTS)}

    def run(self, tensors: list[Any]) -> list[Any]:
        if not torch.isfinite(tensors[1]).all():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [tensors[0] * tensors[1][:, None]]


class FakeGraphs:
    """A graph repeats its launches on the memory that they were captured with, and keeps nothing else of them."""

    made = 0
    broken = False

    def warm_up(self, launches: Callable[[], None]) -> None:
        launches()

    def capture(self, launches: Any) -> Callable[[], None]:
        if FakeGraphs.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        FakeGraphs.made += 1
        call = launches.__self__
        engine, (given, out) = call._engine, ([buffer.native for buffer in side] for side in (call._inputs, call._outputs))
        return lambda: out[0].copy_(engine.compute(given)[0])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> inductor_cuda.InductorCudaBackend:
    monkeypatch.setattr(inductor_cuda, "this_gpu", lambda: H200)
    monkeypatch.setattr(inductor_cuda, "Graphs", FakeGraphs)
    on_the_cpu = lambda _, shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))  # noqa: E731
    monkeypatch.setattr(inductor_cuda.InductorCudaBackend, "allocate", on_the_cpu)
    monkeypatch.setattr(inductor_cuda, "load_file", lambda file, device: {"weight": torch.ones(1)})
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", FakeLibrary)
    FakeGraphs.made, FakeGraphs.broken = 0, False
    return inductor_cuda.InductorCudaBackend(Settings())


def spec_of(**options: Any) -> Engine:
    version = torch.__version__.partition("+")[0]
    given = {"torch": version, "capability": [9, 0], "gpu_bytes": GIB, "sizes": {"B": [1, 8, 1]}, **options}
    return Engine(
        target="inductor-cuda", precision=Precision.BF16, files=tuple(map(str, FILES)), inputs=INPUTS, outputs=OUTPUTS,
        options=given,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:steps are launched kernel by kernel")
@pytest.mark.parametrize("broken", [False, True])
def test_requests_of_one_bucket_share_their_buffers_and_graphs(
    backend: inductor_cuda.InductorCudaBackend, broken: bool
) -> None:
    """Two orders of the swapped buffers are two graphs; where there can be none, buffers come back all the same."""
    FakeGraphs.broken, places = broken, []
    engine = backend.load("step", FILES, spec_of())
    scales = np.array([[2.0, 3], [0.5, 1], [1, 1], [4, 5]], np.float32)
    noise = np.array([[1.0, 2], [3, 4]], np.float32)
    for request in range(3):
        table, scale = backend.to_device(scales), backend.empty((2,))
        samples = backend.empty((2, 2)), backend.empty((2, 2))
        backend.write(samples[0], noise + request)
        calls = [engine.bind({"sample": samples[here], "scale": scale}, {"next_sample": samples[1 - here]}) for here in (0, 1)]
        for index in range(4):
            backend.select(scale, table, index)
            calls[index % 2].run()
        np.testing.assert_array_equal(backend.to_host(samples[0]), (noise + request) * scales.prod(axis=0)[:, None])
        assert backend.is_finite(samples[0])
        places.append([buffer.native.data_ptr() for buffer in (*samples, scale, table)])
        del samples, scale, table, calls
    assert places == [places[0]] * 3
    assert FakeGraphs.made == (0 if broken else 2)
    assert engine.describe() == (INPUTS, OUTPUTS)


def test_rows_are_laid_side_by_side_on_the_gpu(
    backend: inductor_cuda.InductorCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows(backend)
    result = torch.arange(8.0).view(4, 2).T  # a package's result, whose memory is in another order
    kept = Resident(backend, Buffer(result, (2, 4), np.dtype("float32")))
    monkeypatch.setattr(inductor_cuda.torch, "from_numpy", lambda _: pytest.fail("numbers came from the host"))
    made = backend.rows([kept[:1], kept], (1, 2, 3, 4))
    np.testing.assert_array_equal(made.native[0, 1, :2].numpy(), result.numpy())
    np.testing.assert_array_equal(made.native[0, 0, 0].numpy(), result[0].numpy())


@pytest.mark.parametrize("where", ["launch", "end", "afterwards"])
def test_a_capture_that_fails_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """torch's own context does not: where the capture cannot be ended, the thread stays on the capture's stream, so that what
    it launches next is in no order, and the allocator goes on as in a capture, so that no later one begins."""
    now, underway, uses = ["usual"], set(), [0]

    class OnStream:
        def __init__(self, stream: str) -> None:
            self._stream = stream

        def __enter__(self) -> None:
            self._before, now[0] = now[0], self._stream

        def __exit__(self, *error: object) -> None:
            now[0] = self._before

    class Graph:
        def capture_begin(self, pool: tuple[int, int], **options: object) -> None:
            assert now[0] == "of captures"
            assert pool not in underway
            underway.add(pool)
            uses[0] += 1
            self._pool = pool

        def capture_end(self) -> None:
            if where != "afterwards":
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            end(0, self._pool)
            release(0, self._pool)  # what goes with such a graph
            raise RuntimeError("out of memory after the capture")

    def end(device: int, pool: tuple[int, int]) -> None:
        if pool not in underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        underway.remove(pool)

    def release(device: int, pool: tuple[int, int]) -> None:
        uses[0] -= 1

    def empty_cache() -> None:
        assert not underway, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def launches() -> None:
        if where == "launch":
            raise RuntimeError("operation not permitted when stream is capturing")

    stand_ins = {
        "Stream": lambda: "of captures", "stream": OnStream, "CUDAGraph": Graph, "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda: None, "empty_cache": empty_cache, "current_device": lambda: 0,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    below = {"_host_emptyCache": lambda: None, "_cuda_endAllocateToPool": end, "_cuda_releasePool": release}
    for name, stand_in in below.items():
        monkeypatch.setattr(torch._C, name, stand_in, raising=False)
    graphs = inductor_cuda.Graphs()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(during|after the) capture"):
            graphs.capture(launches)
        assert (now, underway, uses) == (["usual"], set(), [0])


def test_weights_lie_where_compiled_kernels_load_vectors() -> None:
    whole = torch.zeros(64, dtype=torch.uint8)
    start = -whole.data_ptr() % 16
    there, between = (whole[start + offset :][:4].view(torch.bfloat16) for offset in (0, 2))
    assert inductor_cuda._aligned(there) is there
    moved = inductor_cuda._aligned(between)
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, between)


def test_arrays_are_copied_on_the_host_only_where_they_must_be(
    backend: inductor_cuda.InductorCudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    from_numpy = torch.from_numpy
    monkeypatch.setattr(inductor_cuda.torch, "from_numpy", lambda array: taken.append(array) or from_numpy(array))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    frozen = array.copy()
    frozen.flags.writeable = False
    buffer = backend.empty((2, 3))
    for given, expected in (
        (array, array), (frozen, array), (array[:, ::-1], array[:, ::-1]), (array[:1], array[[0, 0]]),
        (array.astype(np.float64), array),
    ):  # fmt: skip
        backend.write(buffer, given)
        assert np.array_equal(backend.to_host(buffer), expected)
    assert taken[0] is array
    assert all(other.flags.writeable and other.flags.c_contiguous for other in taken)


def test_wrong_buffers_are_refused_and_cudas_faults_have_their_mend(backend: inductor_cuda.InductorCudaBackend) -> None:
    engine = backend.load("step", FILES, spec_of())
    sample, scale = backend.empty((2, 2)), backend.empty((2,))
    with pytest.raises(EngineError, match="step engine: B is 9, and it was compiled for 1 to 8"):
        engine.bind({"sample": backend.empty((9, 2)), "scale": backend.empty((9,))}, {"next_sample": sample})
    with pytest.raises(EngineError, match=r"step engine's outputs: given \['picture'\]"):
        engine.bind({"sample": sample, "scale": scale}, {"picture": sample})
    backend.write(scale, np.float32(np.nan))
    with pytest.raises(EngineError, match="a fault of the kernels: please report it; until then build with"):
        engine.run({"sample": sample, "scale": scale})


def test_memory_is_asked_for_before_anything_is_loaded(backend: inductor_cuda.InductorCudaBackend) -> None:
    backend.admit({"planner": spec_of(gpu_bytes=40 * GIB), "step": spec_of(gpu_bytes=60 * GIB)})
    with pytest.raises(
        EngineError, match=r"the weights of planner, step need 101\.00 GiB .* 100\.00 GiB are free on NVIDIA H200"
    ):
        backend.admit({"planner": spec_of(gpu_bytes=40 * GIB), "step": spec_of(gpu_bytes=61 * GIB)})
    run = {"bytes": 20 * GIB, "at": {"B": 1}, "powers": {"B": 1.0}}
    engine = backend.load("step", FILES, spec_of(run_memory=run))
    engine.prepare({"sample": (5, 2), "scale": (5,)})
    with pytest.raises(EngineError, match=r"a run at B=6 needs about 120\.00 GiB .*; ask for fewer or smaller pictures"):
        engine.prepare({"sample": (6, 2), "scale": (6,)})


@pytest.mark.parametrize(("options", "message"), [
    ({"torch": "2.9.1"}, r"step.pt2: compiled with torch 2\.9\.1, here is .*pip install torch==2\.9\.1, or build the bundle"),
    ({"capability": [12, 0]}, r"step.pt2: compiled for compute capability 12\.0, NVIDIA H200 has 9\.0; .*--target onnxruntime"),
    ({"capability": None}, "compiled for a CPU, and an engine of target inductor-cuda"),
])  # fmt: skip
def test_a_package_for_elsewhere_is_refused(
    backend: inductor_cuda.InductorCudaBackend, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        backend.load("step", FILES, spec_of(**options))
    assert "\n" not in str(caught.value)
