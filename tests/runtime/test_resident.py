"""Numbers that stay on a device between the planner's engine and the step's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mc_runtime import Runtime
from mc_runtime.backends.base import Backend, Settings
from mc_runtime.backends.onnxruntime import OnnxRuntimeBackend
from mc_runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend, Place
from mc_runtime.backends.registry import create_backend
from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.manifest import Precision, Tensor
from mc_runtime.errors import EngineError
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import EngineClock
from tests.runtime.fake_bundle import write_fake_bundle
from tests.runtime.rows_of_pieces import check_rows

PROMPT = "a red circle"


@pytest.fixture
def backend() -> Backend:
    return create_backend("onnxruntime", Settings(threads=1))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_rows_on_the_host(target: str) -> None:
    check_rows(create_backend(target, Settings(threads=1)))


def test_rows_on_a_device_that_only_takes_whole_tensors() -> None:
    check_rows(OnnxRuntimeCudaBackend(Settings(threads=1), Place("cpu", ("CPUExecutionProvider",), graphs=False)))


def test_parts_stay_where_they_are_and_others_come_to_the_host(backend: Backend) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    whole = Resident(backend, backend.to_device(array))
    second = whole[1][:2]
    assert isinstance(second, Resident)
    assert (second.shape, second.size, second.nbytes, len(second), second.dtype) == ((2, 4), 8, 32, 2, np.float32)
    np.testing.assert_array_equal(np.asarray(second), array[1, :2])
    np.testing.assert_array_equal(np.asarray(whole[:9]), array)
    assert np.asarray(second, np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(second, copy=True), array)
    for key in (-1, slice(1, None), slice(None, None, 2), (0, slice(1, 2)), np.array([1, 0])):
        assert isinstance(whole[key], np.ndarray)
        np.testing.assert_array_equal(whole[key], array[key])
    np.testing.assert_array_equal(np.stack(list(whole)), array)
    with pytest.raises(IndexError):
        whole[2]


def test_a_kept_context_renders_as_one_that_came_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    expected = runtime.generate(PROMPT, seed=3, output="latents").latents
    monkeypatch.setattr(OnnxRuntimeBackend, "keeps", True)
    keeping = Runtime.load(tmp_path / "bundle", threads=1)
    plan = keeping.plan(PROMPT)
    assert isinstance(plan.branches[0].context, Resident)
    assert isinstance(plan.branches[0].canvas, np.ndarray)
    assert plan.branches[0].nbytes == runtime.plan(PROMPT).branches[0].nbytes
    for _ in range(2):  # the second has its plan from the cache
        np.testing.assert_array_equal(keeping.generate(PROMPT, seed=3, output="latents").latents, expected)
    np.testing.assert_array_equal(keeping.render(plan, seed=3, output="latents").latents, expected)


@pytest.mark.parametrize("looks_there", [False, True])
def test_kept_numbers_are_looked_at_where_they_are_or_by_the_step(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, looks_there: bool
) -> None:
    """A look that would fetch them is left to the step's own, which comes in any case."""
    monkeypatch.setattr(type(backend), "keeps", True)
    monkeypatch.setattr(type(backend), "looks_there", looks_there)
    listed = Tensor(name="context", dtype="float32", shape=("L",))
    spec: Any = SimpleNamespace(inputs=(), outputs=(listed,), precision=Precision.FP16, lora=())
    given: Any = SimpleNamespace(name="planner", run=lambda inputs: {"context": backend.to_device(np.full(2, np.nan, "f"))})
    loaded = LoadedEngine(spec, backend, given)
    with pytest.raises(EngineError, match="planner engine: its output context is not finite"):
        loaded.run({}, EngineClock())
    if looks_there:
        with pytest.raises(EngineError, match="context is not finite"):
            loaded.run_keeping(["context"], {}, EngineClock())
    else:
        assert isinstance(loaded.run_keeping(["context"], {}, EngineClock())["context"], Resident)
