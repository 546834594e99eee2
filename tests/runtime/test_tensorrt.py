"""The TensorRT backend against stand-ins of CUDA and of both libraries: buffers, runs, graphs, errors, kept kernels."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends import tensorrt as home
from mc_runtime.backends.base import Backend, Engine, Settings
from mc_runtime.backends.cuda import Stream, this_gpu
from mc_runtime.backends.registry import available, create_backend
from mc_runtime.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES, TrtLibrary
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision, Tensor
from mc_runtime.errors import EngineError, RequestError
from tests.runtime.fake_gpu import FakeCuda, FakeTrt

TENSORS = {
    "sample": (True, "float32", (-1, 3)),
    "ids": (True, "int64", (-1,)),
    "next": (False, "float32", (-1, 3)),
}
SPEC = EngineSpec(
    target="tensorrt",
    precision=Precision.BF16,
    files=("step.engine",),
    inputs=(Tensor(name="sample", dtype="float32", shape=("B", 3)), Tensor(name="ids", dtype="int64", shape=("B",))),
    outputs=(Tensor(name="next", dtype="float32", shape=("B", 3)),),
    options={
        "version": FakeTrt.__version__, "capabilities": ["8.9"], "gpu_bytes": 100,
        "profiles": [{"B": [1, 1, 2]}, {"B": [2, 4, 8]}],
    },
)  # fmt: skip
TARGETS = ("tensorrt", "tensorrt-rtx")


def compute(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"next": (inputs["sample"] * 2 + inputs["ids"][:, None]).astype(np.float32)}


class Gpu:
    """A machine with one: the two stand-ins, and a plan's file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = FakeCuda()
        self.trt = FakeTrt(self.cuda, TENSORS, compute)
        self.folder = folder
        self.plan = folder / "step.engine"
        self.plan.write_bytes(b"plan of a fake")
        monkeypatch.setattr(home, "load_cuda", lambda: self.cuda)
        monkeypatch.setattr(TrtLibrary, "load", lambda library: self.trt)

    def backend(self, target: str = "tensorrt", **settings: Any) -> TensorRtBackend:
        made = create_backend(target, Settings(**settings))
        assert isinstance(made, TensorRtBackend)
        return made

    def load(self, backend: Backend, **options: Any) -> Engine:
        spec = replace(SPEC, target=backend.name, options={**SPEC.options, **options})
        return backend.load("step", (self.plan,), spec)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path, monkeypatch)


def inputs_of(backend: Backend, batch: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {"sample": generator.standard_normal((batch, 3)).astype(np.float32), "ids": generator.integers(0, 9, batch)}
    return {name: backend.to_device(array) for name, array in arrays.items()}, compute(arrays)["next"]


def test_both_targets_are_one_class() -> None:
    assert issubclass(TensorRtRtxBackend, TensorRtBackend)
    assert set(TRT_LIBRARIES) == set(TARGETS)
    assert {name for name in vars(TensorRtRtxBackend) if not name.startswith("_")} == {"name"}


@pytest.mark.parametrize("target", TARGETS)
def test_buffers_live_on_the_gpu_and_come_back(gpu: Gpu, target: str) -> None:
    backend = gpu.backend(target)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = backend.to_device(array)
    assert buffer.array is None
    array[:] = 0  # what was handed over may change at once
    np.testing.assert_array_equal(backend.to_host(buffer), np.arange(6).reshape(2, 3))
    backend.write(buffer, np.float32(3))
    np.testing.assert_array_equal(backend.to_host(buffer), np.full((2, 3), 3))
    assert backend.is_finite(buffer)
    backend.write(buffer, np.float32(np.nan))
    assert not backend.is_finite(buffer)
    backend.select(buffer, backend.table(np.arange(12, dtype=np.float32).reshape(2, 2, 3)), 1)
    np.testing.assert_array_equal(backend.to_host(buffer), np.arange(6, 12).reshape(2, 3))
    empty = backend.empty((4,), "int64")
    assert (empty.dtype, empty.shape) == (np.dtype("int64"), (4,))


@pytest.mark.parametrize("target", TARGETS)
def test_whether_numbers_are_finite_is_asked_without_waiting_for_what_comes_after(gpu: Gpu, target: str) -> None:
    backend = gpu.backend(target)
    buffer = backend.to_device(np.full((2, 3), np.inf, np.float32))
    first = backend.ask_finite(buffer)
    backend.write(buffer, np.float32(1))
    second = backend.ask_finite(buffer)
    backend.write(buffer, np.float32(np.nan))
    (queue,) = (queue for queue in gpu.cuda.queues.values() if queue)
    asked = len(queue)
    assert not first()
    assert 0 < len(queue) < asked
    assert second()
    assert queue
    assert not backend.ask_finite(buffer)()
    assert len(gpu.cuda.pinned) == 2, "host memory is used again"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_run_gives_outputs_of_its_own(gpu: Gpu, target: str, batch: int) -> None:
    backend = gpu.backend(target)
    engine = gpu.load(backend)
    inputs, expected = inputs_of(backend, batch)
    first = engine.run(inputs)["next"]
    others, other = inputs_of(backend, batch, seed=1)
    second = engine.run(others)["next"]
    np.testing.assert_array_equal(backend.to_host(first), expected)
    np.testing.assert_array_equal(backend.to_host(second), other)
    assert gpu.trt.contexts[0].profile == (1 if batch > 2 else 0)


def test_the_signature_is_the_librarys(gpu: Gpu) -> None:
    inputs, outputs = gpu.load(gpu.backend()).describe()
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*inputs, *outputs)] == [
        ("sample", "float32", ("?", 3)), ("ids", "int64", ("?",)), ("next", "float32", ("?", 3)),
    ]  # fmt: skip


@pytest.mark.parametrize(("target", "graphs"), [("tensorrt", 4), ("tensorrt-rtx", 0)])
def test_a_bound_loop_replays_graphs_unless_the_library_does(gpu: Gpu, target: str, graphs: int) -> None:
    """Two calls that swap two buffers, run in turn: launched once, captured once, then replayed."""
    backend = gpu.backend(target)
    engine = gpu.load(backend)
    sample = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    buffers = [backend.to_device(sample), backend.empty(sample.shape)]
    ids = backend.to_device(np.array([1, 2]))
    calls = [engine.bind({"sample": buffers[i], "ids": ids}, {"next": buffers[1 - i]}) for i in (0, 1)]
    expected = sample
    for step in range(6):
        backend.write(ids, np.array([step, step + 1]))
        calls[step % 2].run()
        expected = compute({"sample": expected, "ids": np.array([step, step + 1])})["next"]
        np.testing.assert_array_equal(backend.to_host(buffers[1 - step % 2]), expected)
    assert gpu.cuda.launched_graphs == graphs
    bound = gpu.trt.contexts[1:]
    assert [context.launches for context in bound] == ([2, 2] if graphs else [3, 3])
    if not graphs:
        wanted = FakeTrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert all(context.how.cuda_graph_strategy == wanted for context in bound)
        assert gpu.trt.contexts[0].how.cuda_graph_strategy == FakeTrt.CudaGraphStrategy.DISABLED


def test_the_next_request_finds_its_graphs(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    for round_ in range(3):
        inputs, expected = inputs_of(backend, 2, seed=round_)
        output = backend.empty((2, 3))
        call = engine.bind(inputs, {"next": output})
        call.run()
        np.testing.assert_array_equal(backend.to_host(output), expected)
        del inputs, output, call
        gc.collect()
    assert len(gpu.trt.contexts) == 2, "one for loose runs, one for this bucket"
    assert gpu.cuda.launched_graphs == 2


def test_a_capture_that_fails_costs_only_speed(gpu: Gpu) -> None:
    gpu.cuda.captures_fail = True
    backend = gpu.backend()
    engine = gpu.load(backend)
    inputs, expected = inputs_of(backend, 2)
    output = backend.empty((2, 3))
    call = engine.bind(inputs, {"next": output})
    for _ in range(3):
        backend.write(output, np.float32(0))
        call.run()
        np.testing.assert_array_equal(backend.to_host(output), expected)
    assert gpu.cuda.launched_graphs == 0


def test_all_contexts_compute_in_one_piece_of_memory(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    for batch in (1, 8, 2):
        inputs, _ = inputs_of(backend, batch)
        engine.bind(inputs, {"next": backend.empty((batch, 3))})
    small, large, later = (context.scratch for context in gpu.trt.contexts[1:])
    assert large == later != small
    assert large[1] == 8 * FakeTrt.SCRATCH


def test_preparing_runs_once_for_each_shapes(gpu: Gpu, tmp_path: Path) -> None:
    engine = gpu.load(gpu.backend("tensorrt-rtx", cache_dir=tmp_path / "kept"))
    for _ in range(2):
        engine.prepare({"sample": (2, 3), "ids": (2,)})
    assert gpu.trt.contexts[0].launches == 1
    engine.prepare({"sample": (3, 3), "ids": (3,)})
    assert gpu.trt.contexts[0].launches == 2
    kept = tmp_path / "kept" / "tensorrt-rtx-step.kernels"
    assert kept.read_bytes() == b"kernels"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_kernels_of_another_gpu_are_replaced(gpu: Gpu, tmp_path: Path) -> None:
    kept = tmp_path / "tensorrt-rtx-step.kernels"
    for before, written in ((b"another", True), (b"kernels", False)):
        kept.write_bytes(before)
        age = kept.stat().st_mtime_ns
        gpu.load(gpu.backend("tensorrt-rtx", cache_dir=tmp_path)).prepare({"sample": (2, 3), "ids": (2,)})
        assert kept.read_bytes() == b"kernels"
        assert (kept.stat().st_mtime_ns != age) == written


def test_a_folder_that_cannot_be_written_costs_only_time(gpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = gpu.load(gpu.backend("tensorrt-rtx", cache_dir=tmp_path / "file" / "kept"))
    engine.prepare({"sample": (2, 3), "ids": (2,)})


@pytest.mark.parametrize(("options", "message"), [
    ({"version": "1.6.0.1"}, r"step\.engine: built by tensorrt-rtx 1\.6\.0\.1, and 1\.7\.1\.116 is installed"),
    ({"capabilities": ["12.0"]}, r"compute capability 12\.0, and NVIDIA Fake has 8\.9; .* --compute-capability 8\.9"),
    ({"gpu_bytes": 2**40}, "need 1024.00 GiB"),
])  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_before_it_is_read(gpu: Gpu, options: dict[str, Any], message: str) -> None:
    backend = gpu.backend("tensorrt-rtx")
    spec = replace(SPEC, target="tensorrt-rtx", options={**SPEC.options, **options})
    for refuse in (backend.check, backend.load):
        with pytest.raises(EngineError, match=message):
            refuse("step", (gpu.plan,), spec)


def test_what_the_library_thinks_of_a_plan_is_said_with_its_mend(gpu: Gpu) -> None:
    gpu.trt.diagnostics = 4
    with pytest.raises(EngineError, match=r"step\.engine: the NVIDIA driver is too old for it: update the driver"):
        gpu.backend().check("step", (gpu.plan,), SPEC)
    with pytest.raises(EngineError, match="cannot be read"):
        gpu.backend().check("step", (gpu.folder / "not there",), SPEC)


@pytest.mark.parametrize("damage", [b"", b"not a plan"])
def test_a_damaged_plan_is_one_line(gpu: Gpu, damage: bytes) -> None:
    gpu.plan.write_bytes(damage)
    with pytest.raises(EngineError, match=r"step engine \(.*\) does not load: (magic tag does not match|.*empty)") as caught:
        gpu.load(gpu.backend())
    assert "\n" not in str(caught.value)


def test_wrong_buffers_are_engine_errors(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    inputs, _ = inputs_of(backend, 2)
    with pytest.raises(EngineError, match=r"step engine's inputs: given \['sample'\], there are \['ids', 'sample'\]"):
        engine.bind({"sample": inputs["sample"]}, {"next": backend.empty((2, 3))})
    with pytest.raises(EngineError, match=r"its output next is \[2, 3\], bound to \[2, 4\]"):
        engine.bind(inputs, {"next": backend.empty((2, 4))})
    with pytest.raises(EngineError, match="no profile takes B=9"):
        engine.run(inputs_of(backend, 9)[0])
    gpu.trt.refused = {"run"}
    with pytest.raises(EngineError, match="failed: the library refuses a run"):
        engine.run(inputs)
    gpu.trt.refused = {"ids"}
    with pytest.raises(EngineError, match=r"refuses ids of shape \[2\]"):
        engine.run(inputs)


def test_a_full_memory_is_said_with_its_mend(gpu: Gpu) -> None:
    with pytest.raises(EngineError, match="memory is full: ask for fewer or smaller pictures"):
        gpu.backend().empty((1 << 20,))


def test_memory_goes_back_when_all_is_gone(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    inputs, _ = inputs_of(backend, 2)
    engine.run(inputs)
    assert gpu.cuda.used > 0
    del backend, engine, inputs
    gc.collect()
    assert gpu.cuda.used == 0


def test_a_capture_that_raises_leaves_the_stream_usable() -> None:
    cuda = FakeCuda()
    stream = Stream(cuda)

    def broken() -> None:
        raise EngineError("refused")

    with pytest.raises(EngineError, match="refused"):
        stream.captured(broken, stream)
    assert not cuda.recording
    replay = stream.captured(lambda: cuda.enqueue(stream.handle, lambda: None), stream)
    replay()
    assert cuda.launched_graphs == 1


def test_without_a_gpu(gpu: Gpu) -> None:
    gpu.cuda.devices = 0
    assert this_gpu(gpu.cuda) is None
    for target in TARGETS:
        with pytest.raises(EngineError, match=f"{target} engines run on an NVIDIA GPU, and there is none here"):
            gpu.backend(target)


def test_the_cpu_is_no_device_of_theirs(gpu: Gpu) -> None:
    with pytest.raises(RequestError, match="tensorrt engines run on cuda"):
        gpu.backend(device="cpu")


def test_a_library_that_is_missing_is_said_with_its_install() -> None:
    found = available()["tensorrt"]
    if found["version"] is not None:
        pytest.skip("tensorrt is installed")
    assert found == {
        "ready": False, "version": None, "reason": "tensorrt is not installed", "mend": "pip install 'mc-runtime[tensorrt]'",
    }  # fmt: skip
    with pytest.raises(EngineError, match=r"tensorrt is not installed; pip install 'mc-runtime\[tensorrt\]'"):
        create_backend("tensorrt", Settings())
