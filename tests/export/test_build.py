"""Whole builds of a tiny MetaCanvas checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mc_export.build import BuildEvent, BuildOptions, BuildReport, EngineChoice, State, build_bundle
from mc_export.build import verify as verify_module
from mc_export.build.parts import facts_of, parts_of
from mc_export.checkpoint import load_checkpoint
from mc_export.reference import ReferencePipeline
from mc_runtime import Runtime
from mc_runtime.bundle.manifest import Precision
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import EngineError, OutputError, RequestError
from tests.export.conftest import LIMITS
from tests.factories import tiny_metacanvas_checkpoint

pytestmark = pytest.mark.slow

OPTIONS = BuildOptions(max_steps=4, max_batch=2)
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("metacanvas") / "checkpoint", seed=21, lora=True)


@pytest.fixture(scope="module")
def report(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The first build: nothing of it is in the cache."""
    return build_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", OPTIONS)


def states(report: BuildReport) -> dict[str, str]:
    return {engine.component: engine.state for engine in report.engines}


def test_the_first_build_builds_and_verifies_every_engine(report: BuildReport) -> None:
    assert states(report) == {"planner": "built", "step": "built", "vae_decoder": "built"}
    bundle = open_bundle(report.path)
    bundle.verify()
    for engine in bundle.manifest.engines.values():
        assert engine.error is not None
        assert 0 < engine.error.relative_l2 < 1e-5
        assert len(engine.error.shapes) == 3
        assert {shape["B"] for shape in engine.error.shapes} == {1, 2}


@pytest.mark.parametrize("size", [(32, 32), (48, 36)])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_the_bundle_draws_what_the_reference_draws(
    checkpoint: Path, report: BuildReport, size: tuple[int, int], scale: float
) -> None:
    prompts = [PROMPT, "a cat"]
    noise = np.random.default_rng(1).standard_normal((2, 4, size[0] // 4, size[1] // 4)).astype(np.float32)
    arguments = {"steps": 4, "guidance_scale": scale, "size": size, "latents": noise, "output": "latents"}
    expected = ReferencePipeline.from_checkpoint(checkpoint).generate(prompts, **arguments).latents
    result = Runtime.load(report.path, threads=1).generate(prompts, **arguments).latents
    assert np.abs(result - expected).max() <= 1e-4 * np.ptp(expected)


def test_the_empty_plan_is_what_the_engines_give(report: BuildReport, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(report.path, without)
    manifest = json.loads((without / "manifest.json").read_text())
    manifest["files"].pop(manifest["empty_plan"])
    manifest["empty_plan"] = None
    (without / "manifest.json").write_text(json.dumps(manifest))
    stored, computed = (Runtime.load(path, threads=1).plan(PROMPT).branches[1] for path in (report.path, without))
    np.testing.assert_allclose(stored.context, computed.context, atol=1e-6)
    np.testing.assert_allclose(stored.canvas, computed.canvas, atol=1e-6)
    assert (stored.context_mask == computed.context_mask).all()


def test_a_second_build_takes_everything_from_the_cache(checkpoint: Path, report: BuildReport, tmp_path: Path) -> None:
    events: list[BuildEvent] = []
    again = build_bundle(checkpoint, report.path, OPTIONS, events.append)
    assert set(states(again).values()) == {"cached"}
    assert again.unchanged
    assert "same bundle was there already" in again.why
    assert {event.state for event in events} == {State.CACHED, State.WRITING}
    elsewhere = build_bundle(checkpoint, tmp_path / "elsewhere", OPTIONS)
    assert not elsewhere.unchanged
    assert "planner, step, vae_decoder unchanged: from the cache" in elsewhere.why
    mine, other = (open_bundle(path).manifest for path in (report.path, tmp_path / "elsewhere"))
    assert mine.files == other.files


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8])
def test_another_precision_of_one_component_builds_that_one(
    checkpoint: Path, report: BuildReport, tmp_path: Path, precision: Precision
) -> None:
    exported: list[str] = []
    options = BuildOptions(max_steps=4, max_batch=2, engines={"vae_decoder": EngineChoice("openvino", precision)})

    def progress(event: BuildEvent) -> None:
        if event.state is State.EXPORTING:
            exported.append(event.component)

    changed = build_bundle(checkpoint, tmp_path / "bundle", options, progress)
    assert states(changed) == {"planner": "cached", "step": "cached", "vae_decoder": "built"}
    assert exported == [], "the graph is the same and was kept"
    engine = open_bundle(changed.path).manifest.engines["vae_decoder"]
    assert (engine.target, engine.precision) == ("openvino", precision)
    result = Runtime.load(changed.path, threads=1).generate(PROMPT, steps=2)
    assert result.images[0].size == (32, 32)


def test_another_scheduler_rebuilds_the_step_alone(checkpoint: Path) -> None:
    opened = load_checkpoint(checkpoint)

    def facts(order: int) -> dict[str, dict]:
        limits = replace(LIMITS, order=order)
        return {part.component: facts_of(part, opened, limits, {}) for part in parts_of(opened, limits, OPTIONS)}

    first, second = facts(1), facts(3)
    assert {component for component in first if first[component] != second[component]} == {"step"}


def test_force_builds_again(checkpoint: Path, report: BuildReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(part, *arguments):
        made.append(part.component)
        return {"engine": json.loads(json.dumps(_entry_of(report, part.component, arguments[1]))), "seconds": 0.0}

    monkeypatch.setattr("mc_export.build.placing.make_engine", noted)
    forced = build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(max_steps=4, max_batch=2, force=True))
    assert made == ["planner", "step", "vae_decoder"]
    assert set(states(forced).values()) == {"built"}


def _entry_of(report: BuildReport, component: str, directory: Path) -> dict:
    """The manifest's engine of a finished bundle, its files copied to `directory`."""
    raw = json.loads((report.path / "manifest.json").read_text())["engines"][component]
    for name in raw["files"]:
        shutil.copyfile(report.path / name, directory / Path(name).name)
    return {**raw, "files": [Path(name).name for name in raw["files"]]}


class _Stop(BaseException):
    """An interruption, as Ctrl-C is one."""


@pytest.fixture
def quiet_cache(report: BuildReport, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished entries: the workers of a parallel run build in the shared cache meanwhile."""
    quiet = tmp_path / "cache"
    for entry in own_cache.rglob("entry.json"):
        if ".staged-" not in str(entry):
            shutil.copytree(entry.parent, quiet / entry.parent.relative_to(own_cache))
    monkeypatch.setenv("MC_RUNTIME_CACHE", str(quiet))
    return quiet


@pytest.mark.parametrize("state", [State.LOADING, State.QUANTIZING, State.VERIFYING])
def test_an_interrupted_build_leaves_the_old_bundle_and_a_whole_cache(
    checkpoint: Path, report: BuildReport, quiet_cache: Path, state: State
) -> None:
    before = {path: path.read_bytes() for path in report.path.rglob("*") if path.is_file()}
    entries = sorted(quiet_cache.rglob("entry.json"))

    def stop(event: BuildEvent) -> None:
        if event.state is state:
            raise _Stop

    options = BuildOptions(max_steps=4, max_batch=2, engines={"vae_decoder": EngineChoice("onnxruntime", Precision.INT8)})
    with pytest.raises(_Stop):
        build_bundle(checkpoint, report.path, options, stop)
    assert {path: path.read_bytes() for path in report.path.rglob("*") if path.is_file()} == before
    assert [path.name for path in report.path.parent.iterdir()] == [report.path.name]
    assert sorted(quiet_cache.rglob("entry.json")) == entries
    assert not [path for path in quiet_cache.rglob("*") if ".staged-" in path.name]
    assert set(states(build_bundle(checkpoint, report.path, OPTIONS)).values()) == {"cached"}


def test_an_engine_beyond_its_tolerance_fails_the_build(
    checkpoint: Path, report: BuildReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify_module.TOLERANCE, Precision.BF16, 1e-6)
    options = BuildOptions(max_steps=4, max_batch=2, engines={"vae_encoder": EngineChoice("openvino", Precision.BF16)})
    with pytest.raises(EngineError, match=r"^vae_encoder: openvino bf16 is off by .* --engine vae_encoder=openvino:fp32$"):
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_not_replaced(checkpoint: Path, report: BuildReport, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        build_bundle(checkpoint, tmp_path, OPTIONS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ((30, 32),)}, "size 30x32: sides must be multiples of 4 from 8 to 256; the nearest is 32x32"),
        ({"sizes": ((4, 32),)}, "the nearest is 8x32"),
        ({"engines": {"text_encoder": EngineChoice("openvino", Precision.FP32)}}, "it has planner, step, vae_decoder"),
        (
            {"target": "tensorrt-rtx", "precision": Precision.FP8, "lora_rank": 4},
            "planner and step cannot take one in fp8; say --engine planner=tensorrt-rtx:bf16 --engine step=tensorrt-rtx:bf16,",
        ),
        (
            {"target": "openvino", "precision": Precision.INT8, "lora_rank": 4, "step_cache": True},
            "planner and step cannot take one in int8; say --engine planner=openvino:fp32 --engine step=openvino:fp32, or",
        ),
        (
            {"engines": {"step": EngineChoice("tensorrt-rtx", Precision.INT4)}, "lora_rank": 4},
            "so step cannot take one in int4; say --engine step=tensorrt-rtx:bf16, or leave --lora-rank out",
        ),
    ],
)
def test_what_a_checkpoint_cannot_do_is_refused(checkpoint: Path, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(**arguments))
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ("9.9",)}, "--compute-capability 9.9: tensorrt-rtx builds for"),
        ({"compute_capabilities": ("8.0",)}, "--compute-capability 8.0: fp8 needs compute capability 8.9"),
        ({"calibration": Path("missing.json")}, "missing.json: no such file"),
        ({"target": "inductor-cuda"}, "inductor-cuda compiles on the GPU it is for"),
    ],
)
def test_what_a_later_engine_cannot_be_is_said_before_the_first_is_built(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    """The planner is built first, for many minutes where it is large; the step's refusal must not wait for it."""
    if (target := options.pop("target", "tensorrt-rtx")) == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx")
    elif torch.cuda.is_available():
        pytest.skip("there is a GPU to compile on")
    monkeypatch.setattr("mc_export.build.placing.make_engine", lambda part, *_: pytest.fail(f"{part.component} was built"))
    engines = {"step": EngineChoice(target, Precision.FP8)}
    with pytest.raises((RequestError, EngineError), match=re.escape(message)):
        build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(engines=engines, force=True, **options))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "planner.onnx")

    monkeypatch.setattr("mc_export.build.placing.copy_files", full)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        build_bundle(checkpoint, tmp_path / "bundle", OPTIONS)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
