"""Buffers, graphs and checks of the CUDA backend, as far as they need no GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends import registry
from mc_runtime.backends.base import Buffer, Settings
from mc_runtime.backends.cuda_graphs import GraphCache, graph_key, in_order
from mc_runtime.backends.device_buffers import BufferPool
from mc_runtime.backends.gpu import Gpu, check_gpu, check_run, check_weights, gpu_mend
from mc_runtime.backends.packages import Package, RunMemory
from mc_runtime.backends.registry import available, create_backend
from mc_runtime.errors import BundleError, EngineError

WHERE = Path("engines/step.pt2")
GIB = 2**30
H200 = Gpu("NVIDIA H200", (9, 0), 100 * GIB)
RUN = RunMemory(64 * GIB, {"B": 1, "H": 64, "W": 128}, {"B": 1, "H": 1, "W": 1})


def package_of(capability: tuple[int, int] | None = (9, 0), gpu_bytes: int = 0, run: RunMemory | None = None) -> Package:
    return Package("2.13.0", (), {}, capability, gpu_bytes, run)


def counting_pool() -> tuple[BufferPool, list[tuple[Any, ...]]]:
    made: list[tuple[Any, ...]] = []

    def allocate(shape: tuple[int, ...], dtype: str) -> int:
        made.append((shape, dtype))
        return len(made)

    return BufferPool(allocate), made


def test_the_next_request_gets_the_same_buffers_in_the_same_order() -> None:
    pool, made = counting_pool()
    asked = [((2, 3), "float32"), ((2, 3), "float32"), ((2,), "int64"), ((2, 3), "float32")]
    first = [pool.buffer(*each) for each in asked]
    handles = [buffer.native for buffer in first]
    assert len(set(handles)) == len(made) == 4
    assert first[2].dtype == np.dtype("int64")
    first.reverse()  # whatever order they go in
    del first
    gc.collect()
    again = [pool.buffer(*each) for each in asked]
    assert [buffer.native for buffer in again] == handles
    assert len(made) == 4


def test_a_buffer_in_use_is_not_handed_out() -> None:
    pool, made = counting_pool()
    kept = pool.buffer((4,), "float32")
    other = pool.buffer((4,), "float32")
    assert other.native != kept.native
    handle = other.native
    del other
    assert pool.buffer((5,), "float32").native not in (kept.native, handle)
    assert pool.buffer((4,), "float32").native == handle
    assert len(made) == 3


def test_a_full_memory_is_emptied_of_other_shapes_first() -> None:
    room = [2]

    def allocate(shape: tuple[int, ...], dtype: str) -> Handle:
        if not room[0]:
            raise EngineError("full")
        room[0] -= 1
        return Handle(room)

    pool = BufferPool(allocate)
    small, large = pool.buffer((1,), "float32"), pool.buffer((2,), "float32")
    with pytest.raises(EngineError, match="full"):
        pool.buffer((3,), "float32")
    del small
    gc.collect()
    assert pool.buffer((3,), "float32").shape == (3,)
    assert large.shape == (2,)


class Handle:
    """Memory that gives its room back when it goes."""

    def __init__(self, room: list[int]) -> None:
        self.room = room

    def __del__(self) -> None:
        self.room[0] += 1


class FakeRecorder:
    """Notes what it is asked for; `broken` captures fail the way CUDA's do."""

    def __init__(self, broken: Exception | None = None) -> None:
        self.seen: list[str] = []
        self.broken = broken

    def warm_up(self, launches: Callable[[], None]) -> None:
        self.seen.append("warm up")
        launches()

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        self.seen.append("capture")
        if self.broken:
            raise self.broken
        return lambda: self.seen.append("replay")


def test_a_graph_is_captured_once_and_replayed() -> None:
    recorder = FakeRecorder()
    cache = GraphCache(recorder, kept=2)
    launch = lambda: recorder.seen.append("launch")  # noqa: E731
    for _ in range(4):
        cache.run("a", launch)
    assert recorder.seen == ["warm up", "launch", "capture", "replay", "replay", "replay"]
    recorder.seen.clear()
    for key in "bcaa":  # `a` was dropped for `c`
        cache.run(key, launch)
    assert recorder.seen == ["warm up", "launch"] * 3 + ["capture", "replay"]


def test_no_more_graphs_are_kept_than_allowed() -> None:
    recorder = FakeRecorder()
    cache = GraphCache(recorder, kept=3)
    for _ in range(2):  # two orders of two buffers are two keys of one bucket: the least recently used bucket goes first
        for key in ("small 0", "small 1", "large 0"):
            cache.run(key, lambda: None)
    cache.run("small 0", lambda: None)
    cache.run("other", lambda: None)  # `small 1` goes
    recorder.seen.clear()
    cache.run("small 0", lambda: None)
    cache.run("large 0", lambda: None)
    assert recorder.seen == ["replay", "replay"]
    cache.run("small 1", lambda: None)
    assert recorder.seen[2:] == ["warm up"]


@pytest.mark.parametrize("error", [
    RuntimeError("operation not permitted when stream is capturing"), EngineError("step engine (step.pt2) failed: capturing"),
])  # fmt: skip
def test_what_cannot_be_captured_is_launched_every_time(error: Exception) -> None:
    recorder = FakeRecorder(broken=error)
    cache = GraphCache(recorder)
    launch = lambda: recorder.seen.append("launch")  # noqa: E731
    cache.run("a", launch)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: .*capturing"):
        cache.run("a", launch)
    for _ in range(2):
        cache.run("a", launch)
    assert recorder.seen == ["warm up", "launch", "capture", "launch", "launch", "launch"]
    assert "capturing" in str(cache.refused)


def test_a_launch_that_fails_is_an_error_and_is_tried_again() -> None:
    recorder = FakeRecorder(broken=RuntimeError("CUDA out of memory"))
    cache = GraphCache(recorder)
    full = [False]

    def launch() -> None:
        if full[0]:
            raise EngineError("step engine: the GPU's memory is full")

    cache.run("a", launch)
    full[0] = True
    for _ in range(2):
        with pytest.warns(RuntimeWarning), pytest.raises(EngineError, match="memory is full"):
            cache.run("a", launch)
    assert recorder.seen == ["warm up", "capture", "capture"]
    with pytest.raises(EngineError):
        cache.run("b", launch)
    full[0] = False
    cache.run("b", launch)
    assert recorder.seen[-2:] == ["warm up", "warm up"]


def buffer_at(address: int, *shape: int) -> Buffer:
    return Buffer(address, shape, np.dtype("float32"))


def test_a_bucket_is_its_addresses_and_shapes() -> None:
    buffers = [buffer_at(100, 2, 4), buffer_at(200, 8)]
    key = graph_key(1, buffers, int)
    assert key == graph_key(1, list(buffers), int)
    others = [
        graph_key(2, buffers, int),
        graph_key(1, buffers[::-1], int),
        graph_key(1, [buffer_at(100, 4, 2), buffers[1]], int),
        graph_key(1, [buffer_at(101, 2, 4), buffers[1]], int),
    ]
    assert key not in others
    assert len(set(others)) == 4


def test_buffers_are_bound_by_name() -> None:
    buffers = {"b": buffer_at(2, 1), "a": buffer_at(1, 1)}
    assert [buffer.native for buffer in in_order(["a", "b"], buffers, "step engine's inputs")] == [1, 2]
    with pytest.raises(EngineError, match=r"step engine's inputs: given \['a', 'b'\], there are \['a', 'c'\]"):
        in_order(["a", "c"], buffers, "step engine's inputs")


def test_a_gpu_that_fits() -> None:
    check_gpu(package_of(), WHERE, H200)
    check_gpu(package_of((8, 0)), WHERE, Gpu("NVIDIA L4", (8, 9), 1))  # a later one of the same generation
    check_weights({"step": package_of(gpu_bytes=60 * GIB), "planner": package_of(gpu_bytes=40 * GIB)}, H200)
    check_run("step", package_of(), {"B": 100}, H200)  # of which the build did not say what it takes
    check_run("step", package_of(run=RUN), {"B": 1, "H": 100, "W": 128}, H200)


@pytest.mark.parametrize(("package", "gpu", "message"), [
    (package_of(), None, "a GPU of compute capability 9.0, and torch sees none here; .*--target onnxruntime"),
    (package_of((8, 9)), H200, "compute capability 8.9, NVIDIA H200 has 9.0; .*--target onnxruntime"),
    (package_of((8, 9)), Gpu("NVIDIA A100", (8, 0), 1), "compute capability 8.9, NVIDIA A100 has 8.0"),
    (package_of(None), H200, "compiled for a CPU"),
])  # fmt: skip
def test_a_gpu_of_another_kind(package: Package, gpu: Gpu | None, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        check_gpu(package, WHERE, gpu)
    assert "\n" not in str(caught.value)


def test_too_little_memory_for_the_weights_says_how_much_is_needed() -> None:
    packages = {"planner": package_of(gpu_bytes=41 * GIB), "step": package_of(gpu_bytes=60 * GIB)}
    message = (
        r"the weights of planner, step need 101\.00 GiB of GPU memory and 100\.00 GiB are free on NVIDIA H200; "
        r"end what else runs there, build the bundle in bf16, or build it for another target, such as --target onnxruntime$"
    )
    with pytest.raises(EngineError, match=message):
        check_weights(packages, H200)


def test_too_little_memory_for_a_run_is_said_before_it() -> None:
    """64 GiB at batch 1, 64 x 128: with H to the power of two, 100 cells are 156 GiB."""
    message = (
        r"a run at B=1, H=100, W=128 needs about 156\.25 GiB of GPU memory and 100\.00 GiB are .*; ask for fewer or smaller"
    )
    with pytest.raises(EngineError, match=message) as caught:
        check_run("step", package_of(run=replace(RUN, powers={"B": 1, "H": 2, "W": 1})), {"B": 1, "H": 100, "W": 128}, H200)
    assert str(caught.value).endswith("or build it for another target, such as --target onnxruntime")
    assert RUN.at_sizes({"B": 3, "W": 64}) == 64 * GIB * 3 // 2
    for wrong in ({"bytes": -1}, {"powers": {"B": 1}}, {"at": {"B": 0, "H": 1, "W": 1}}):
        with pytest.raises(ValueError, match="run_memory"):
            replace(RUN, **wrong)


def test_what_cuda_says_is_said_with_its_mend() -> None:
    assert gpu_mend("CUDA out of memory. Tried to allocate 2 GiB").startswith("the GPU's memory is full: ask for fewer")
    assert "build the bundle again" in gpu_mend("CUDA error: no kernel image is available for execution on the device")
    assert "update the driver" in gpu_mend("CUDA driver version is insufficient for CUDA runtime version")
    assert gpu_mend("something else") == "something else"


def test_without_a_gpu_a_bundle_for_one_is_refused_and_doctor_says_why() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"run on an NVIDIA GPU, and torch .*--target onnxruntime"):
        create_backend("inductor-cuda", Settings())
    found = available()["inductor-cuda"]
    assert not found["ready"]
    assert "GPU" in found["reason"] or "CUDA" in found["reason"]
    assert found["mend"]


def test_a_driver_is_known_by_whatever_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidia0"
    monkeypatch.setattr(registry, "_DRIVER", (tmp_path / "version", device))
    assert registry._no_gpu() is not None
    device.touch()
    assert registry._no_gpu() is None
