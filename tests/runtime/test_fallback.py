"""A bundle of two sets of engines: its own for a GPU, and those it falls back on where they do not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime import Runtime
from mc_runtime.backends import tensorrt
from mc_runtime.backends.trt_libraries import TrtLibrary
from mc_runtime.bundle.manifest import Fallback, Manifest
from mc_runtime.bundle.store import open_bundle, write_manifest
from mc_runtime.cli.main import cli
from mc_runtime.errors import BundleError, EngineError, RequestError
from tests.runtime.fake_bundle import write_fake_bundle
from tests.runtime.fake_gpu import FakeCuda, FakeTrt

PROMPT = "a red circle"
PLAN: dict[str, Any] = {
    "version": FakeTrt.__version__, "capabilities": ["8.9"], "gpu_bytes": 1, "profiles": [{"B": [1, 1, 4]}],
}  # fmt: skip


def rewritten(bundle: Path, change: Callable[[Manifest], Manifest]) -> Path:
    write_manifest(bundle, change(open_bundle(bundle).manifest))
    return bundle


def for_a_gpu(folder: Path, spare: bool = True, **plan: Any) -> Path:
    """The fake bundle as one whose own engines are plans; as a fallback it has the ones that it really holds."""

    def change(manifest: Manifest) -> Manifest:
        own = {
            name: replace(engine, target="tensorrt-rtx", options={**PLAN, **plan}) for name, engine in manifest.engines.items()
        }
        fallback = Fallback(engines=manifest.engines, machine=manifest.machine) if spare else None
        return replace(manifest, engines=own, fallback=fallback)

    return rewritten(write_fake_bundle(folder), change)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(devices=0)
    monkeypatch.setattr(tensorrt, "load_cuda", lambda: cuda)
    monkeypatch.setattr(TrtLibrary, "load", lambda library: FakeTrt(cuda, {}, lambda inputs: inputs))


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt, "load_cuda", lambda: cuda)
    monkeypatch.setattr(TrtLibrary, "load", lambda library: FakeTrt(cuda, {}, lambda inputs: inputs))


def test_the_fallback_draws_the_same_picture_and_says_why(tmp_path: Path, no_gpu: None) -> None:
    plain = Runtime.load(write_fake_bundle(tmp_path / "plain"), threads=1)
    assert plain.fell_back is None
    runtime = Runtime.load(for_a_gpu(tmp_path / "gpu"), threads=1, fallback="onnxruntime")
    assert runtime.fell_back is not None
    assert "there is none here" in runtime.fell_back
    assert {engine.target for engine in runtime.manifest.engines.values()} == {"onnxruntime"}
    expected = plain.generate(PROMPT, seed=3, size=(32, 48))
    result = runtime.generate(PROMPT, seed=3, size=(32, 48))
    np.testing.assert_array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))


def test_without_being_asked_it_says_what_to_ask(tmp_path: Path, no_gpu: None) -> None:
    with pytest.raises(EngineError, match=r"there is none here.*; or run the engines it holds .* --fallback onnxruntime$"):
        Runtime.load(for_a_gpu(tmp_path / "bundle"))
    with pytest.raises(EngineError, match=r"there is none here.*another target$"):
        Runtime.load(for_a_gpu(tmp_path / "bare", spare=False))


@pytest.mark.parametrize(("plan", "why"), [
    ({"version": "1.6.0.0"}, r"built by tensorrt-rtx 1\.6\.0\.0, and 1\.7\.1\.116 is installed"),
    ({"capabilities": ["12.0"]}, r"compute capability 12\.0, and NVIDIA Fake has 8\.9"),
    ({"gpu_bytes": 2**50}, "GiB of GPU memory"),
])  # fmt: skip
def test_a_plan_of_another_version_or_gpu_is_an_engine_error_and_the_fallback_runs(
    tmp_path: Path, a_gpu: None, plan: dict[str, Any], why: str
) -> None:
    bundle = for_a_gpu(tmp_path / "bundle", **plan)
    with pytest.raises(EngineError, match=why):
        Runtime.load(bundle)
    runtime = Runtime.load(bundle, threads=1, fallback="onnxruntime")
    assert runtime.generate(PROMPT, steps=2).images[0].size == (32, 32)


def test_engines_that_run_are_not_fallen_back_from(tmp_path: Path, a_gpu: None) -> None:
    runtime = Runtime.load(for_a_gpu(tmp_path / "bundle"), fallback="onnxruntime")
    assert runtime.fell_back is None
    assert {engine.target for engine in runtime.manifest.engines.values()} == {"tensorrt-rtx"}
    plain = Runtime.load(write_fake_bundle(tmp_path / "plain"), threads=1, fallback="openvino")
    assert plain.fell_back is None


@pytest.mark.parametrize(("spare", "message"), [
    (True, r"of engines to fall back on it holds only onnxruntime ones: build it with --fallback openvino"),
    (False, r"of engines to fall back on it holds none: build it with --fallback openvino"),
])  # fmt: skip
def test_a_fallback_that_is_not_there(tmp_path: Path, no_gpu: None, spare: bool, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Runtime.load(for_a_gpu(tmp_path / "bundle", spare=spare), fallback="openvino")
    with pytest.raises(RequestError, match="fallback must be a target's name"):
        Runtime.load(tmp_path / "bundle", fallback=3)  # type: ignore[arg-type]


def test_the_fallback_needs_its_own_machine(tmp_path: Path, no_gpu: None) -> None:
    def other(manifest: Manifest) -> Manifest:
        assert manifest.fallback is not None
        machine = replace(manifest.machine, features=("a_feature_of_no_cpu",))
        return replace(manifest, fallback=replace(manifest.fallback, machine=machine))

    bundle = rewritten(for_a_gpu(tmp_path / "bundle"), other)
    with pytest.raises(BundleError, match="needs CPU features a_feature_of_no_cpu"):
        Runtime.load(bundle, fallback="onnxruntime")


@pytest.mark.parametrize(("change", "message"), [
    (lambda fallback: fallback["engines"].pop("step"), r"fallback\.engines: 'step' is missing"),
    (lambda fallback: fallback["engines"]["step"]["inputs"].pop(), "fallback"),
    (lambda fallback: fallback["engines"]["vae_decoder"]["outputs"][0].update(shape=["B", 16, 16, 3]),
     r"fallback\.engines\.vae_decoder: has other inputs or outputs"),
    (lambda fallback: fallback["engines"]["step"].update(files=["engines/other.onnx"]), "'engines/other.onnx' is used but not"),
    (lambda fallback: fallback.update(extra=1), "extra"),
])  # fmt: skip
def test_a_fallback_that_could_not_stand_in_is_a_bundle_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = for_a_gpu(tmp_path / "bundle") / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw["fallback"])
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        open_bundle(path.parent)


def test_the_command_tells_and_draws(tmp_path: Path, no_gpu: None) -> None:
    bundle = for_a_gpu(tmp_path / "bundle")
    line = ["generate", str(bundle), PROMPT, "-o", str(tmp_path / "out.png"), "--json"]
    refused = CliRunner().invoke(cli, line)
    assert refused.exit_code == 4
    assert "--fallback onnxruntime" in json.loads(refused.stdout)["error"]["message"]
    result = CliRunner().invoke(cli, [*line, "--fallback", "onnxruntime"])
    assert result.exit_code == 0, result.stderr
    assert "running the bundle's onnxruntime engines: " in result.stderr
    assert (tmp_path / "out.png").is_file()
    assert set(json.loads(result.stdout)["versions"]) == {"mc_runtime", "onnxruntime"}


def test_inspect_lists_both_sets(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(for_a_gpu(tmp_path / "bundle"))])
    assert result.exit_code == 0, result.stderr
    assert "tensorrt-rtx fp32" in result.stdout
    assert "fallback" in result.stdout
    assert "onnxruntime fp32" in result.stdout
