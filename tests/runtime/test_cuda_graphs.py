"""Buffers, graphs and checks of the CUDA backend, as far as they need no GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends.base import Buffer, Settings
from mc_runtime.backends.cuda_graphs import BufferPool, GraphCache, graph_key, in_order
from mc_runtime.backends.packages import Gpu, Package, check_gpu, gpu_mend
from mc_runtime.backends.registry import available, create_backend
from mc_runtime.errors import BundleError, EngineError

WHERE = Path("engines/step.pt2")
H200 = Gpu("NVIDIA H200", (9, 0), 100 * 2**30)


def package_of(capability: tuple[int, int] | None = (9, 0), gpu_bytes: int = 0) -> Package:
    return Package("2.13.0", (), {}, capability, gpu_bytes)


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


def test_a_graph_is_captured_once_and_replayed() -> None:
    seen: list[str] = []

    def capture(launches: Callable[[], None]) -> Callable[[], None]:
        seen.append("capture")
        return lambda: seen.append("replay")

    cache = GraphCache(capture, kept=2)
    for _ in range(4):
        cache.run("a", lambda: seen.append("launch"))
    assert seen == ["launch", "capture", "replay", "replay", "replay"]
    seen.clear()
    for key in "bcaa":  # `a` was dropped for `c`
        cache.run(key, lambda: seen.append("launch"))
    assert seen == ["launch", "launch", "launch", "capture", "replay"]


def test_a_failed_capture_leaves_no_graph() -> None:
    def capture(launches: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("capture failed")

    cache = GraphCache(capture)
    ran: list[int] = []
    cache.run("a", lambda: ran.append(1))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            cache.run("a", lambda: ran.append(1))
    assert ran == [1]


def buffer_at(address: int, *shape: int) -> Buffer:
    return Buffer(address, shape, np.dtype("float32"))


def test_a_bucket_is_its_addresses_and_shapes() -> None:
    buffers = [buffer_at(100, 2, 4), buffer_at(200, 8)]
    key = graph_key("step", buffers, int)
    assert key == graph_key("step", list(buffers), int)
    others = [
        graph_key("planner", buffers, int),
        graph_key("step", buffers[::-1], int),
        graph_key("step", [buffer_at(100, 4, 2), buffers[1]], int),
        graph_key("step", [buffer_at(101, 2, 4), buffers[1]], int),
    ]
    assert key not in others
    assert len(set(others)) == 4


def test_buffers_are_bound_by_name() -> None:
    buffers = {"b": buffer_at(2, 1), "a": buffer_at(1, 1)}
    assert [buffer.native for buffer in in_order(["a", "b"], buffers, "step engine's inputs")] == [1, 2]
    with pytest.raises(EngineError, match=r"step engine's inputs: given \['a', 'b'\], there are \['a', 'c'\]"):
        in_order(["a", "c"], buffers, "step engine's inputs")


def test_a_gpu_that_fits() -> None:
    check_gpu(package_of(gpu_bytes=2**30), WHERE, H200)
    check_gpu(package_of((8, 0)), WHERE, Gpu("NVIDIA L4", (8, 9), 1))  # a later one of the same generation


@pytest.mark.parametrize(("package", "gpu", "kind", "message"), [
    (package_of(), None, BundleError, "a GPU of compute capability 9.0, and torch sees none here; .*--target onnxruntime"),
    (package_of((8, 9)), H200, BundleError, "compute capability 8.9, NVIDIA H200 has 9.0; .*--target onnxruntime"),
    (package_of((8, 9)), Gpu("NVIDIA A100", (8, 0), 1), BundleError, "compute capability 8.9, NVIDIA A100 has 8.0"),
    (package_of(None), H200, BundleError, "compiled for a CPU"),
    (package_of(gpu_bytes=101 * 2**30), H200, EngineError, "needs 101.00 GiB of GPU memory .* 100.00 GiB are free on NVIDIA"),
])  # fmt: skip
def test_a_gpu_that_does_not_fit(package: Package, gpu: Gpu | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        check_gpu(package, WHERE, gpu)
    assert "\n" not in str(caught.value)


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
