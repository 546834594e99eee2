"""onnxruntime with tensors on a device of its own: all but the CUDA provider, on the CPU's."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mc_runtime import Runtime
from mc_runtime.backends import registry
from mc_runtime.backends.base import Buffer, Settings
from mc_runtime.backends.onnxruntime_cuda import CUDA, GraphNumbers, OnnxRuntimeCudaBackend, Place
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import EngineError, RequestError
from tests.runtime.fake_bundle import CHANNELS, write_fake_bundle

# The CPU as onnxruntime's device: what the GPU's path does, but for CUDA.
HERE = Place("cpu", ("CPUExecutionProvider",), graphs=False)
NUMBERED = Place("cpu", ("CPUExecutionProvider",), graphs=True)
LATENTS = np.linspace(-2, 2, 2 * CHANNELS * 2 * 3, dtype=np.float32).reshape(2, CHANNELS, 2, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("cuda") / "bundle")


@pytest.fixture
def backend() -> OnnxRuntimeCudaBackend:
    return OnnxRuntimeCudaBackend(Settings(threads=1), HERE)


def load(backend, bundle: Path, component: str):
    spec = open_bundle(bundle).manifest.engines[component]
    return backend.load(component, tuple(bundle / name for name in spec.files), spec)


def test_buffers_are_copies(backend: OnnxRuntimeCudaBackend) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = backend.to_device(array.T)
    array[:] = -1
    found = backend.to_host(buffer)
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3).T)
    backend.write(buffer, np.float32(5))
    assert found[0, 0] == 0
    np.testing.assert_array_equal(backend.to_host(buffer), np.full((3, 2), 5))
    assert buffer.array is None
    assert backend.to_host(backend.to_device(np.array([1, 2]))).dtype == np.int64
    assert not backend.is_finite(backend.to_device(np.array([1, np.nan], np.float32)))


@pytest.mark.parametrize("place", [HERE, NUMBERED])
@pytest.mark.parametrize("component", ["vae_decoder"])
def test_a_run_equals_the_host_backends(bundle: Path, component: str, place: Place) -> None:
    backend = OnnxRuntimeCudaBackend(Settings(threads=1), place)
    host = create_backend("onnxruntime", Settings(threads=1))
    found = load(backend, bundle, component).run({"latents": backend.to_device(LATENTS)})["pixels"]
    expected = load(host, bundle, component).run({"latents": host.to_device(LATENTS)})["pixels"]
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(backend.to_host(found), host.to_host(expected))


def test_bound_calls_read_and_write_in_place(backend: OnnxRuntimeCudaBackend, bundle: Path) -> None:
    engine = load(backend, bundle, "vae_decoder")
    latents, pixels = backend.empty(LATENTS.shape), backend.empty((2, 16, 24, 3))
    call = engine.bind({"latents": latents}, {"pixels": pixels})
    for factor in (1, -1):
        backend.write(latents, factor * LATENTS)
        call.run()
        large = (factor * LATENTS[:, :3]).repeat(8, axis=2).repeat(8, axis=3).astype(np.float64)
        np.testing.assert_allclose(backend.to_host(pixels), (1 / (1 + np.exp(-large))).transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("place", [HERE, NUMBERED])
def test_the_same_bundle_draws_the_same_picture_there(bundle: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole requests through the path of `--device cuda`, with loops on swapped buffers."""
    plain = Runtime.load(bundle, threads=1)
    there = OnnxRuntimeCudaBackend(Settings(threads=1), place)
    monkeypatch.setattr("mc_runtime.runtime.engines.create_backend", lambda name, settings: there)
    runtime = Runtime.load(bundle, threads=1, device="cuda")
    for seed, size in ((1, (32, 32)), (2, (48, 32)), (1, (32, 32))):
        arguments = {"seed": seed, "size": size, "num_images": 2, "steps": 5, "guidance_scale": 3.0}
        expected, result = (each.generate("a red circle", **arguments) for each in (plain, runtime))
        np.testing.assert_array_equal(result.latents, expected.latents)
        np.testing.assert_array_equal(np.asarray(result.images[1]), np.asarray(expected.images[1]))


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_loop_asks_nothing_back_from_the_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = OnnxRuntimeCudaBackend(Settings(threads=1), HERE)
    asked: list[tuple[int, ...]] = []
    to_host = there.to_host
    monkeypatch.setattr(there, "to_host", lambda buffer: (asked.append(buffer.shape), to_host(buffer))[1])
    monkeypatch.setattr("mc_runtime.runtime.engines.create_backend", lambda name, settings: there)
    runtime = Runtime.load(bundle, threads=1, device="cuda")
    counts = []
    for steps in (2, 5):
        asked.clear()
        runtime.generate("a red circle", steps=steps, output="latents")
        counts.append(len(asked))
        runtime.forget_plans()
    assert counts[0] == counts[1], "no more is read back in a longer loop"
    noise = np.full((1, CHANNELS, 4, 4), 3e38, np.float32)
    with pytest.raises(EngineError, match="step 5 of 5: the latents are not finite"):
        runtime.generate("a red circle", steps=5, size=(32, 32), latents=noise, guidance_scale=40.0)


def test_the_next_request_has_the_same_addresses(backend: OnnxRuntimeCudaBackend) -> None:
    first = [backend.empty((2, 3)) for _ in range(2)]
    addresses = [buffer.native.data_ptr() for buffer in first]
    del first
    gc.collect()
    assert [backend.empty((2, 3)).native.data_ptr() for _ in range(1)] == addresses[:1]


def test_graphs_have_a_number_each_as_long_as_there_are_any() -> None:
    numbers = GraphNumbers(most=2)
    assert [numbers.number(key) for key in ("a", "b", "a", "c", "b")] == ["1", "2", "1", "-1", "2"]


def test_a_place_without_graphs() -> None:
    name, options = CUDA.without_graphs().providers[0]
    assert (name, options) == ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert not CUDA.without_graphs().graphs
    assert CUDA.graphs


def test_an_engine_that_cannot_be_captured_runs_without(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[object]] = []
    session = ort.InferenceSession

    def refuse_graphs(path: str, options: object, providers: list[object], **more: object) -> object:
        asked.append(providers)
        if len(asked) == 1:
            raise RuntimeError("This session cannot use the graph capture feature")
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", refuse_graphs)
    place = Place("cpu", (("CPUExecutionProvider", {"enable_cuda_graph": "1"}),), graphs=True)
    backend = OnnxRuntimeCudaBackend(Settings(threads=1), place)
    engine = load(backend, bundle, "vae_decoder")
    assert asked == [[("CPUExecutionProvider", {"enable_cuda_graph": "1"})], [("CPUExecutionProvider", {})]]
    assert engine.run({"latents": backend.to_device(LATENTS)})["pixels"].shape == (2, 16, 24, 3)


OTHERS: dict[str, Callable[[OnnxRuntimeCudaBackend, Path, Buffer], object]] = {
    "memory": lambda backend, bundle, buffer: backend.allocate((7,), "float32"),
    "upload": lambda backend, bundle, buffer: backend.write(buffer, np.float32(1)),
    "download": lambda backend, bundle, buffer: backend.to_host(buffer),
    "load": lambda backend, bundle, buffer: load(backend, bundle, "vae_decoder"),
    "run": lambda backend, bundle, buffer: load(backend, bundle, "vae_decoder").run({"latents": buffer}),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("graphs", [False, True])
def test_other_threads_ask_nothing_of_cuda_while_a_graph_is_captured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, other: str, graphs: bool
) -> None:
    """onnxruntime captures in CUDA's global mode: what another thread asks for meanwhile fails, and so does the capture. It
    captures the first time that a thread runs a graph's number."""
    backend = OnnxRuntimeCudaBackend(Settings(threads=1), NUMBERED if graphs else HERE)
    engine, buffer = load(backend, bundle, "vae_decoder"), backend.to_device(LATENTS)
    call = engine.bind({"latents": backend.to_device(LATENTS)}, {"pixels": backend.empty((2, 16, 24, 3))})
    run = engine.session.run_with_iobinding

    def runs(first: bool) -> None:
        done: list[str] = []
        thread = threading.Thread(target=lambda: (OTHERS[other](backend, bundle, buffer), done.append("other")))

        def meanwhile(binding: object, options: object) -> None:
            thread.start()
            thread.join(0.3 if first and graphs else 30)
            done.append("run")
            run(binding, options)

        with monkeypatch.context() as patch:
            patch.setattr(engine.session, "run_with_iobinding", meanwhile)
            call.run()
        thread.join()
        assert done == (["run", "other"] if first and graphs else ["other", "run"])

    runs(first=True)
    runs(first=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(runs, first=True).result()
        pool.submit(runs, first=False).result()


def test_a_provider_that_does_not_load_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would run on the CPU instead, and mention it in its log."""
    asked: dict[str, object] = {}
    session = ort.InferenceSession

    def without_cuda(path: str, options: object, providers: list[object], **more: object) -> object:
        asked.update(more)
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", without_cuda)
    place = Place("cpu", (("CUDAExecutionProvider", {}), "CPUExecutionProvider"), graphs=False)
    with pytest.raises(EngineError, match=r"vae_decoder engine .*: there is no CUDAExecutionProvider, .* the device cpu"):
        load(OnnxRuntimeCudaBackend(Settings(threads=1), place), bundle, "vae_decoder")
    assert asked == {"enable_fallback": False}


def test_wrong_buffers_and_files_are_engine_errors(backend: OnnxRuntimeCudaBackend, bundle: Path, tmp_path: Path) -> None:
    engine = load(backend, bundle, "vae_decoder")
    with pytest.raises(EngineError, match="vae_decoder engine"):
        engine.run({"latents": backend.to_device(LATENTS[0])})
    with pytest.raises(EngineError, match="vae_decoder engine's inputs"):
        engine.bind({"nonsense": backend.to_device(LATENTS)}, {"pixels": backend.empty((2, 16, 24, 3))})
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07not a model")
    with pytest.raises(EngineError, match="does not load"):
        backend.load("step", (tmp_path / "model.onnx",), open_bundle(bundle).manifest.engines["step"])


def test_an_onnxruntime_without_cuda_says_what_to_install(bundle: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(EngineError, match=r"built without CUDA; pip uninstall onnxruntime && pip install 'mc-runtime\[gpu\]'"):
        create_backend("onnxruntime", Settings(device="cuda"))
    with pytest.raises(EngineError, match="built without CUDA"):
        Runtime.load(bundle, device="cuda")


def test_other_targets_and_devices_stay_as_they_are() -> None:
    assert create_backend("onnxruntime", Settings(device="cpu")).devices == ("cpu",)
    with pytest.raises(RequestError, match="openvino engines run on cpu"):
        create_backend("openvino", Settings(device="cuda"))
    with pytest.raises(RequestError, match="onnxruntime engines run on cpu"):
        create_backend("onnxruntime", Settings(device="npu"))
    assert registry.runs_on_gpu("tensorrt")
    assert not registry.runs_on_gpu("onnxruntime")
