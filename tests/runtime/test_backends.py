"""The same contract for every backend: load, describe, run, bind, and errors of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends.base import Backend, Settings
from mc_runtime.backends.registry import TARGETS, available, create_backend
from mc_runtime.bundle.manifest import Engine, Precision
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import BundleError, EngineError, RequestError
from tests.runtime.fake_bundle import CHANNELS, write_fake_bundle

LATENTS = np.linspace(-2, 2, 2 * CHANNELS * 2 * 3, dtype=np.float32).reshape(2, CHANNELS, 2, 3)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("backends") / "bundle")


# Targets that read ONNX, as the fake bundle holds it; packages of torch's compiler are tested where they are built.
ONNX_TARGETS = ("onnxruntime", "openvino")


@pytest.fixture(params=ONNX_TARGETS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return create_backend(request.param, Settings(threads=1))


def spec_of(bundle: Path, component: str) -> Engine:
    return open_bundle(bundle).manifest.engines[component]


def load(backend: Backend, bundle: Path, component: str):  # type: ignore[no-untyped-def]
    spec = spec_of(bundle, component)
    return backend.load(component, tuple(bundle / name for name in spec.files), spec)


def decoded(latents: np.ndarray) -> np.ndarray:
    large = latents[:, :3].repeat(8, axis=2).repeat(8, axis=3).astype(np.float64)
    return (1 / (1 + np.exp(-large))).transpose(0, 2, 3, 1)


def test_run_lets_the_library_allocate(backend: Backend, bundle: Path) -> None:
    engine = load(backend, bundle, "vae_decoder")
    outputs = engine.run({"latents": backend.to_device(LATENTS)})
    pixels = backend.to_host(outputs["pixels"])
    assert outputs["pixels"].shape == (2, 16, 24, 3)
    np.testing.assert_allclose(pixels, decoded(LATENTS), atol=1e-6)
    again = backend.to_host(engine.run({"latents": backend.to_device(-LATENTS)})["pixels"])
    np.testing.assert_allclose(pixels, decoded(LATENTS), atol=1e-6)  # the first result is not overwritten
    np.testing.assert_allclose(again, decoded(-LATENTS), atol=1e-6)


def test_bound_calls_read_and_write_in_place(backend: Backend, bundle: Path) -> None:
    engine = load(backend, bundle, "vae_decoder")
    latents, pixels = backend.empty(LATENTS.shape), backend.empty((2, 16, 24, 3))
    call = engine.bind({"latents": latents}, {"pixels": pixels})
    for factor in (1, -1):
        backend.write(latents, factor * LATENTS)
        call.run()
        np.testing.assert_allclose(backend.to_host(pixels), decoded(factor * LATENTS), atol=1e-6)


def test_host_arrays_are_shared_unless_they_cannot_be(backend: Backend) -> None:
    array = np.ones((2, 3), np.float32)
    assert np.shares_memory(backend.to_host(backend.to_device(array)), array)
    locked = np.broadcast_to(np.float32(2), (2, 3))
    np.testing.assert_array_equal(backend.to_host(backend.to_device(locked)), locked)
    np.testing.assert_array_equal(backend.to_host(backend.to_device(array[:, ::2])), array[:, ::2])


def test_describe_agrees_with_the_manifest(backend: Backend, bundle: Path) -> None:
    for component in ("planner", "step", "vae_decoder"):
        spec = spec_of(bundle, component)
        for found, listed in zip(load(backend, bundle, component).describe(), (spec.inputs, spec.outputs), strict=True):
            assert {tensor.name: tensor.dtype for tensor in found} == {tensor.name: tensor.dtype for tensor in listed}
            for tensor in found:
                wanted = next(other for other in listed if other.name == tensor.name)
                for size, other in zip(tensor.shape, wanted.shape, strict=True):
                    assert isinstance(size, str) == isinstance(other, str)


def test_is_finite(backend: Backend) -> None:
    array = np.ones((1, 4, 8, 8), np.float32)
    assert backend.is_finite(backend.to_device(array))
    array[0, 3, 7, 7] = np.nan
    assert not backend.is_finite(backend.to_device(array))
    array[0, 3, 7, 7] = -np.inf
    assert not backend.is_finite(backend.to_device(array))
    largest = np.full((4, 4), np.finfo(np.float32).max, np.float32)
    assert backend.is_finite(backend.to_device(largest))  # though its sum is not


def test_damaged_engine_is_an_engine_error(backend: Backend, bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x08\x07not a model")
    with pytest.raises(EngineError, match=r"vae_decoder engine .*does not load") as caught:
        backend.load("vae_decoder", (file,), spec_of(bundle, "vae_decoder"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_wrong_shape_is_an_engine_error(backend: Backend, bundle: Path) -> None:
    engine = load(backend, bundle, "vae_decoder")
    with pytest.raises(EngineError, match="vae_decoder engine"):
        engine.run({"latents": backend.to_device(LATENTS[0])})
    with pytest.raises(EngineError, match="vae_decoder engine"):
        engine.bind({"nonsense": backend.to_device(LATENTS)}, {"pixels": backend.empty((2, 16, 24, 3))})


def test_another_device_is_refused() -> None:
    for name in TARGETS:
        with pytest.raises(RequestError, match=r"device 'toaster': .* engines run on (cpu|cuda)"):
            create_backend(name, Settings(device="toaster"))


def test_openvino_computes_in_the_precision_of_the_manifest(bundle: Path) -> None:
    from mc_runtime.backends.openvino import OpenVinoBackend

    backend = OpenVinoBackend(Settings(threads=1))
    spec = spec_of(bundle, "step")
    for precision, hint in ((Precision.FP32, "f32"), (Precision.BF16, "bf16"), (Precision.INT8, "f32")):
        properties = backend._properties(Engine(**{**vars(spec), "precision": precision}))
        assert properties["INFERENCE_PRECISION_HINT"] == hint
        assert properties["INFERENCE_NUM_THREADS"] == 1
    chosen = {**vars(spec), "options": {"properties": {"INFERENCE_PRECISION_HINT": "bf16"}}}
    assert backend._properties(Engine(**chosen))["INFERENCE_PRECISION_HINT"] == "bf16"


def test_openvino_keeps_compiled_engines_where_it_is_told(bundle: Path, tmp_path: Path) -> None:
    backend = create_backend("openvino", Settings(threads=1, cache_dir=tmp_path / "compiled"))
    load(backend, bundle, "vae_decoder").prepare({"latents": LATENTS.shape})
    assert any((tmp_path / "compiled").iterdir())
    again = load(create_backend("openvino", Settings(threads=1, cache_dir=tmp_path / "compiled")), bundle, "vae_decoder")
    pixels = again.run({"latents": backend.to_device(LATENTS)})["pixels"]
    np.testing.assert_allclose(backend.to_host(pixels), decoded(LATENTS), atol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_openvino_compiles_for_the_shapes_it_meets(bundle: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_runtime.backends.openvino import OpenVinoEngine

    compiled: list[tuple[int, ...]] = []
    compile_for = OpenVinoEngine._compile

    def counted(self: OpenVinoEngine, shapes: dict[str, tuple[int, ...]]) -> object:
        compiled.append(shapes["latents"])
        return compile_for(self, shapes)

    monkeypatch.setattr(OpenVinoEngine, "_compile", counted)
    backend = create_backend("openvino", Settings(threads=1))
    spec = Engine(**{**vars(spec_of(bundle, "vae_decoder")), "options": {"specialise": kept}})
    engine = backend.load("vae_decoder", (bundle / spec.files[0],), spec)
    large, small = LATENTS, LATENTS[:1]
    engine.prepare({"latents": large.shape})
    for latents in (large, small, small, large, small):
        pixels = engine.run({"latents": backend.to_device(latents)})["pixels"]
        np.testing.assert_allclose(backend.to_host(pixels), decoded(latents), atol=1e-6)
    expected = {0: [], 1: [large, small, large, small], 2: [large, small]}[kept]
    assert compiled == [latents.shape for latents in expected]


def test_onnxruntime_takes_session_options_from_the_manifest(bundle: Path) -> None:
    from mc_runtime.backends.onnxruntime import session_options

    options = {"graph_optimization": "none", "session": {"session.intra_op.allow_spinning": 0}}
    spec = Engine(**{**vars(spec_of(bundle, "step")), "options": options})
    made = session_options("step", spec, Settings(threads=1))
    assert made.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert made.intra_op_num_threads == 1


@pytest.mark.parametrize("options", [{"graph_optimization": "most"}, {"session": ["spin"]}])
def test_onnxruntime_refuses_options_that_are_not_its_own(bundle: Path, options: dict[str, Any]) -> None:
    spec = replace(open_bundle(bundle).manifest.engines["planner"], options=options)
    with pytest.raises(BundleError, match="build the bundle again"):
        create_backend("onnxruntime", Settings()).load("planner", (bundle / spec.files[0],), spec)


def test_onnxruntime_reports_nothing_home(bundle: Path, tmp_path: Path) -> None:
    """Where its reports are on, it keeps a database in the user's cache and a session's number among the temporary files."""
    code = f"from mc_runtime import Runtime; Runtime.load({str(bundle)!r}).generate('a red circle', steps=1)"
    places = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    silencing = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS")
    others = {name: value for name, value in os.environ.items() if name not in silencing}
    subprocess.run([sys.executable, "-c", code], env=others | places, check=True)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("importing", ["mc_runtime.backends.openvino", "mc_export.lower.openvino"])
def test_openvino_reports_nothing_home(importing: str, tmp_path: Path) -> None:
    """Where its reports are on, importing it counts its uses in the user's home, and looks for its maker."""
    pytest.importorskip("openvino")
    others = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    subprocess.run([sys.executable, "-c", f"import {importing}"], env=others | {"HOME": str(tmp_path)}, check=True)
    assert not (tmp_path / "intel").exists()


def test_listing_targets_imports_no_library() -> None:
    code = (
        "import sys; from mc_runtime.backends.registry import available; found = available(); "
        "assert not {'onnxruntime', 'openvino'} & set(sys.modules), sys.modules; "
        "assert all(found[name]['ready'] and found[name]['version'] for name in ('onnxruntime', 'openvino')), found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_runtime.backends.registry.find_spec", lambda module: None)
    monkeypatch.setitem(sys.modules, "mc_runtime.backends.openvino", None)
    with pytest.raises(EngineError, match=r"openvino is not installed.*pip install 'mc-runtime\[openvino\]'"):
        create_backend("openvino", Settings())
    found = available()
    assert found["openvino"]["ready"] is False
    assert "mc-runtime[cpu]" in found["onnxruntime"]["mend"]


def test_unknown_target() -> None:
    with pytest.raises(BundleError, match="onnxruntime, openvino"):
        create_backend("abacus", Settings())
