"""The TensorRT backend against stand-ins of CUDA and of both libraries: buffers, runs, graphs, kept kernels."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from mc_runtime.backends.cuda import Stream
from mc_runtime.backends.resident import Resident
from mc_runtime.backends.tensorrt import TensorRtBackend, TensorRtRtxBackend
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES
from mc_runtime.errors import EngineError
from tests.runtime.fake_gpu import FakeCuda, FakeTrt
from tests.runtime.fake_tensorrt import TARGETS, Gpu, compute, inputs_of
from tests.runtime.rows_of_pieces import check_rows


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path, monkeypatch)


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
def test_rows_are_laid_side_by_side_on_the_gpu(gpu: Gpu, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(backend := gpu.backend(target))
    kept = Resident(backend, backend.to_device(np.ones((2, 4), np.float32)))
    monkeypatch.setattr(Stream, "download", lambda *_: pytest.fail("numbers came to the host"))
    monkeypatch.setattr(Stream, "upload", lambda *_: pytest.fail("numbers came from the host"))
    backend.rows([kept[:1], kept], (1, 2, 3, 4))


@pytest.mark.parametrize("target", TARGETS)
def test_whether_numbers_are_finite_is_asked_without_waiting_for_what_comes_after(gpu: Gpu, target: str) -> None:
    backend = gpu.backend(target)
    buffer = backend.empty((2, 3))
    table = backend.table(np.broadcast_to(np.array([np.inf, 1, np.nan], np.float32)[:, None, None], (3, 2, 3)))
    backend.select(buffer, table, 0)
    first = backend.ask_finite(buffer)
    backend.select(buffer, table, 1)
    second = backend.ask_finite(buffer)
    backend.select(buffer, table, 2)
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
    call.run()
    said = (FakeTrt.ILogger.ERROR, "not permitted\nwhen capturing")
    gpu.trt.between_kernels = lambda: backend.log.log(*said) if gpu.cuda.recording else None
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: CUDA: something else: not permitted when capturing"):
        call.run()
    for _ in range(2):
        backend.write(output, np.float32(0))
        call.run()
        np.testing.assert_array_equal(backend.to_host(output), expected)
    assert gpu.cuda.launched_graphs == 0
    assert not backend.log.errors, "what was said of it is not said of a later fault"


def test_no_memory_is_given_back_while_a_graph_is_captured(gpu: Gpu) -> None:
    """CUDA takes none back then, and the capture is lost; the collector comes when it likes."""
    backend = gpu.backend()
    inputs, expected = inputs_of(backend, 2)
    output = backend.empty((2, 3))
    call = gpu.load(backend).bind(inputs, {"next": output})
    call.run()
    cycle: list[object] = [backend.stream.allocate((1,), "float32")]
    cycle.append(cycle)
    used = gpu.cuda.used
    thresholds = gc.get_threshold()

    def meanwhile() -> None:
        gc.set_threshold(1)
        assert [[] for _ in range(100)]
        gc.set_threshold(*thresholds)

    gpu.trt.between_kernels = meanwhile
    del cycle
    call.run()
    np.testing.assert_array_equal(backend.to_host(output), expected)
    assert gpu.cuda.launched_graphs == 1
    assert gpu.cuda.used == used
    gc.collect()
    assert gpu.cuda.used < used


def test_all_contexts_compute_in_one_piece_of_memory(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    for batch in (1, 8, 2):
        inputs, _ = inputs_of(backend, batch)
        engine.bind(inputs, {"next": backend.empty((batch, 3))})
    small, large, later = (context.scratch for context in gpu.trt.contexts[1:])
    assert large == later != small
    assert large[1] == 8 * FakeTrt.SCRATCH


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bound", [False, True])
def test_two_threads_do_not_compute_in_the_shared_memory_at_once(gpu: Gpu, target: str, bound: bool) -> None:
    """One's kernels between another's would overwrite what these hand each other."""
    backend = gpu.backend(target)
    engines = [gpu.load(backend) for _ in range(2)]
    (inputs, expected), (others, other) = (inputs_of(backend, 2, seed) for seed in (0, 1))
    output, found = backend.empty((2, 3)), {}
    call = engines[0].bind(inputs, {"next": output})
    thread = threading.Thread(target=lambda: found.update(engines[1].run(others)))

    def meanwhile() -> None:
        gpu.trt.between_kernels = lambda: None
        thread.start()
        thread.join(0.2)

    gpu.trt.between_kernels = meanwhile
    if bound:
        call.run()
    else:
        output = engines[0].run(inputs)["next"]
    thread.join()
    np.testing.assert_array_equal(backend.to_host(output), expected)
    np.testing.assert_array_equal(backend.to_host(found["next"]), other)


@pytest.mark.parametrize("target", TARGETS)
def test_a_context_is_left_alone_while_a_run_of_it_is_under_way(gpu: Gpu, target: str) -> None:
    backend = gpu.backend(target)
    engine = gpu.load(backend)
    asked = [inputs_of(backend, batch) for batch in (2, 8)]
    outputs = [engine.run(inputs)["next"] for inputs, _ in asked]  # nobody has waited for the one before
    for output, (_, expected) in zip(outputs, asked, strict=True):
        np.testing.assert_array_equal(backend.to_host(output), expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("runs", [1, 3])
def test_a_context_goes_when_its_runs_are_over_and_before_its_kernels(gpu: Gpu, target: str, runs: int) -> None:
    backend = gpu.backend(target)
    engine = gpu.load(backend)
    inputs, _ = inputs_of(backend, 2)
    call = engine.bind(inputs, {"next": backend.empty((2, 3))})
    for _ in range(runs):
        call.run()
    engine.run(inputs)
    gpu.trt.contexts.clear()
    del call, engine, backend, inputs
    gc.collect()
    assert gpu.trt.broken_rules == []


def test_preparing_runs_once_for_each_shapes(gpu: Gpu, tmp_path: Path) -> None:
    engine = gpu.load(gpu.backend("tensorrt-rtx", cache_dir=tmp_path / "kept"))
    for _ in range(2):
        engine.prepare({"sample": (2, 3), "ids": (2,)})
    assert sum(context.launches for context in gpu.trt.contexts) == 1
    engine.prepare({"sample": (3, 3), "ids": (3,)})
    assert sum(context.launches for context in gpu.trt.contexts) == 2
    kept = tmp_path / "kept" / "tensorrt-rtx-step.kernels"
    assert kept.read_bytes() == b"kernels"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_requests_do_not_wait_for_kernels_of_their_shapes(gpu: Gpu) -> None:
    """A prompt of another length would wait for seconds; only what is prepared does."""
    backend = gpu.backend("tensorrt-rtx")
    engine = gpu.load(backend)
    inputs, _ = inputs_of(backend, 2)
    engine.run(inputs)
    engine.bind(inputs, {"next": backend.empty((2, 3))}).run()
    lazy = FakeTrt.DynamicShapesKernelSpecializationStrategy.LAZY
    assert {context.how.dynamic_shapes_kernel_specialization_strategy for context in gpu.trt.contexts} == {lazy}


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


def test_memory_goes_back_when_all_is_gone(gpu: Gpu) -> None:
    backend = gpu.backend()
    engine = gpu.load(backend)
    inputs, _ = inputs_of(backend, 2)
    engine.run(inputs)
    assert gpu.cuda.used > 0
    gpu.trt.contexts.clear()
    del backend, engine, inputs
    gc.collect()
    assert gpu.cuda.used == 0
    assert not gpu.cuda.queues, "streams"


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
