"""Bundles with TensorRT plans, built without a GPU: manifest, cache, fallback, and what runs of them here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mc_export.build import BuildEvent, BuildOptions, BuildReport, EngineChoice, State, build_bundle
from mc_export.build.usual import plan_wishes
from mc_export.checkpoint import load_checkpoint
from mc_runtime import Runtime
from mc_runtime.bundle.abilities import Sizes
from mc_runtime.bundle.manifest import Precision
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import EngineError
from tests.factories import tiny_metacanvas_checkpoint

pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.slow, pytest.mark.matrix]

PROMPT = "a red circle left of a blue square"
DECODER = EngineChoice("tensorrt-rtx", Precision.BF16)
OPTIONS = BuildOptions(
    max_steps=4, max_batch=2, engines={"vae_decoder": DECODER}, fallback=EngineChoice("onnxruntime", Precision.FP32),
    compute_capabilities=("8.9",),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that no other test builds: they share a cache, and say what they found in it."""
    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("metacanvas") / "checkpoint", seed=29, layers=1)


@pytest.fixture(scope="module")
def events() -> list[BuildEvent]:
    return []


@pytest.fixture(scope="module")
def report(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, events: list[BuildEvent]) -> BuildReport:
    """Planner and step by onnxruntime, the decoder as a plan, and a fallback that shares the former two."""
    return build_bundle(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", OPTIONS, events.append)


def test_the_manifest_says_what_the_plan_is_for(report: BuildReport) -> None:
    bundle = open_bundle(report.path)
    bundle.verify()
    manifest = bundle.manifest
    own = manifest.engines["vae_decoder"]
    assert (own.target, own.precision, own.files) == ("tensorrt-rtx", Precision.BF16, ("engines/vae_decoder.engine",))
    assert own.options["capabilities"] == ["8.9"]
    assert own.options["profiles"] == [{"B": [1, 1, 2], "H": [2, 8, 64], "W": [2, 8, 64]}]
    assert own.options["gpu_bytes"] == manifest.files[own.files[0]].bytes
    assert own.error is not None
    assert own.error.of == "graph", "there is no GPU to run it on"
    assert 0 < own.error.relative_l2 < 5e-2
    assert len(own.error.shapes) == 3
    assert manifest.fallback is not None
    spare = manifest.fallback.engines
    assert spare["vae_decoder"].files == ("fallback/vae_decoder.onnx",)
    assert spare["vae_decoder"].error.of == "engine"  # type: ignore[union-attr]
    assert {name: spare[name] for name in ("planner", "step")} == {name: manifest.engines[name] for name in ("planner", "step")}
    assert [engine.component for engine in report.engines] == ["planner", "step", "vae_decoder", "vae_decoder (fallback)"]


def test_the_build_tells_how_far_the_library_is(report: BuildReport, events: list[BuildEvent]) -> None:
    building = [event.done for event in events if event.state is State.BUILDING]
    assert len(building) > 10
    assert building == sorted(building)
    assert building[-1] - building[0] == pytest.approx(5.0)
    assert events[-1].state is State.WRITING


def test_a_second_build_takes_plans_from_the_cache(checkpoint: Path, report: BuildReport) -> None:
    again = build_bundle(checkpoint, report.path, OPTIONS)
    assert {engine.state for engine in again.engines} == {"cached"}
    assert again.unchanged


def test_without_a_gpu_the_fallback_draws(checkpoint: Path, report: BuildReport, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"; or run the engines it holds for that with --fallback onnxruntime$"):
        Runtime.load(report.path)
    runtime = Runtime.load(report.path, threads=1, fallback="onnxruntime")
    plain = build_bundle(checkpoint, tmp_path / "plain", BuildOptions(max_steps=4, max_batch=2))
    expected = Runtime.load(plain.path, threads=1).generate(PROMPT, seed=4, steps=3, guidance_scale=3.0)
    result = runtime.generate(PROMPT, seed=4, steps=3, guidance_scale=3.0)
    np.testing.assert_array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))
    assert runtime.manifest.empty_plan is not None, "planned by the engines that run here"


def test_an_unread_graph_names_the_engine_and_the_mend(
    checkpoint: Path, report: BuildReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's refusal fails the build whole, and leaves nothing."""
    from mc_export.lower import tensorrt

    def refuse(*_: object) -> None:
        raise EngineError("vae_decoder: tensorrt-rtx 0 cannot read its graph")

    monkeypatch.setattr(tensorrt, "_parse", refuse)
    options = replace(OPTIONS, compute_capabilities=("12.0",), fallback=None)
    with pytest.raises(EngineError, match="cannot read its graph"):
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("component", "usual", "fixed"), [
    ("step", {"B": 1, "G": 2, "H": 6, "W": 10, "h": 3, "w": 5}, {"H": 6, "W": 10, "h": 3, "w": 5}),
    ("planner", {"B": 1, "G": 2, "h": 3, "w": 5}, {"h": 3, "w": 5}),
    ("vae_decoder", {"B": 1, "G": 2, "H": 6, "W": 10}, {"H": 6, "W": 10}),
    ("vae_encoder", {"B": 1, "G": 2, "h": 24, "w": 40}, None),
    ("vision", {"B": 1, "G": 2}, {}),
])  # fmt: skip
def test_what_a_plan_is_tuned_for(
    checkpoint: Path, component: str, usual: dict[str, int], fixed: dict[str, int] | None
) -> None:
    opened = load_checkpoint(checkpoint)
    anything = Sizes(default=(24, 40), multiple=4, min=8, max=256)
    wishes = plan_wishes(component, opened, anything, ("8.9",))
    assert (wishes.usual, wishes.served, wishes.capabilities) == (usual, (), ("8.9",))
    only = Sizes(default=(24, 40), served=((24, 40), (32, 32)), multiple=4, min=8, max=40)
    found = plan_wishes(component, opened, only).served
    assert (found[0] if found else None) == (fixed or None)
    assert re.fullmatch("step|planner|vae_decoder", component) is None or len(found) == 2
