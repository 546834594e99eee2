"""What a TensorRT backend says of plans, buffers and machines that do not fit, against stand-ins of CUDA and the libraries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mc_runtime.backends.base import Settings
from mc_runtime.backends.cuda import this_gpu
from mc_runtime.backends.registry import available, create_backend
from mc_runtime.errors import EngineError, RequestError
from tests.runtime.fake_tensorrt import SPEC, TARGETS, Gpu, inputs_of


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path, monkeypatch)


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
    backend = gpu.backend()
    said = r"step\.engine: the NVIDIA driver is too old for it: update the driver \(what the library found\)"
    with pytest.raises(EngineError, match=said):
        backend.check("step", (gpu.plan,), SPEC)
    assert not backend.log.errors, "what was said of it is not said of a later fault"
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


def test_what_engines_before_it_took_is_not_free(gpu: Gpu) -> None:
    gpu.cuda.room = 1000
    backend = gpu.backend()
    weights = backend.stream.allocate((600,), "int8")
    with pytest.raises(EngineError, match=r"step\.engine: its weights need .* are free on NVIDIA Fake"):
        gpu.load(backend, gpu_bytes=500)
    del weights
    gpu.load(backend, gpu_bytes=500)


def test_without_a_gpu(gpu: Gpu) -> None:
    gpu.cuda.devices = gpu.cuda.driver = 0
    assert this_gpu(gpu.cuda) is None
    for target in TARGETS:
        with pytest.raises(EngineError, match=f"{target} engines run on an NVIDIA GPU, and there is none here"):
            gpu.backend(target)


def test_a_driver_that_is_too_old_is_not_taken_for_none(gpu: Gpu) -> None:
    gpu.cuda.driver = 12080
    with pytest.raises(EngineError, match=r"driver is too old .* or pip install cuda-bindings, of your driver's CUDA"):
        gpu.backend()


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
