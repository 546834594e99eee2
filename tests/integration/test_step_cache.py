"""Requests that keep residuals between steps: each sample by its own change, by the threshold that the build calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mc_export.build import BuildOptions, build_bundle
from mc_export.build.options import EngineChoice
from mc_export.build.step_cache import THRESHOLDS, chosen
from mc_export.checkpoint import load_checkpoint
from mc_runtime import Runtime
from mc_runtime.bundle.manifest import Calibrated, Precision, StepCache
from mc_runtime.errors import RequestError
from mc_runtime.lora import PLAIN
from mc_runtime.runtime.reuse import reuse_of
from tests.factories import tiny_metacanvas_checkpoint
from tests.factories_unet import tiny_metacanvas_sdxl
from tests.program_bundle import programs_as_engines
from tests.tiny_backbones import cases
from tests.tiny_flux import tiny_metacanvas_flux
from tests.tiny_wan import tiny_metacanvas_wan

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PROMPTS = ["a red circle", "two green triangles"]
EVERYTHING = 1e6
Build = Callable[..., Runtime]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """Builds bundles whose engines are programs that were not exported."""
    with programs_as_engines(tmp_path_factory.mktemp("cache")) as builder:
        yield builder


@pytest.fixture(scope="module")
def sana(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("sana")
    checkpoint = tiny_metacanvas_checkpoint(folder / "checkpoint", seed=11)
    return build(checkpoint, folder / "bundle", max_steps=10, step_cache=True, cache_loss=0.02, lora_rank=2)


def latents(runtime: Runtime, prompts: Any = PROMPTS, **arguments: Any) -> Any:
    return runtime.generate(
        prompts, **{"steps": 10, "size": (64, 32), "seed": [3, 9][: len(prompts)], "output": "latents"} | arguments
    )


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> bool:
    return bool(np.abs(found - expected).max() < tolerance * (expected.max() - expected.min()))


def test_a_threshold_that_keeps_nothing_changes_nothing(sana: Runtime) -> None:
    whole, kept = latents(sana), latents(sana, cache=0)
    assert close(kept.latents, whole.latents)
    assert kept.computed_steps == whole.computed_steps == (10, 10)
    assert np.array_equal(latents(sana, cache=False).latents, whole.latents)


def test_guards_bound_what_is_kept(sana: Runtime) -> None:
    """The first and the last step are computed, and one after every three that kept: steps 0, 4, 8 and 9 of ten."""
    listed = sana.manifest.step_cache
    assert listed is not None
    assert (listed.first, listed.last, listed.max_consecutive) == (1, 1, 3)
    kept = latents(sana, cache=EVERYTHING)
    assert kept.computed_steps == (4, 4)
    assert not close(kept.latents, latents(sana).latents, 1e-4)


def test_a_result_does_not_depend_on_what_it_is_batched_with(sana: Runtime) -> None:
    together = None
    for threshold in np.geomspace(0.002, 1, 24):
        found = latents(sana, cache=float(threshold))
        if len(set(found.computed_steps)) == 2:
            together = found
            break
    assert together is not None, "no threshold tells these requests apart"
    for index, prompt in enumerate(PROMPTS):
        alone = latents(sana, [prompt], seed=[3, 9][index], cache=float(threshold))
        assert alone.computed_steps == together.computed_steps[index : index + 1]
        assert close(alone.latents[0], together.latents[index])


def test_the_build_calibrates_a_threshold(sana: Runtime, build: Build, tmp_path: Path) -> None:
    listed = sana.manifest.step_cache
    assert listed is not None
    assert listed.threshold in (0.0, *THRESHOLDS)
    assert (listed.loss, listed.requests, listed.steps) == (0.02, 8, sana.manifest.steps.default)
    assert [row.threshold for row in listed.calibrated] == list(THRESHOLDS[: len(listed.calibrated)])
    assert all(row.loss <= row.largest for row in listed.calibrated)
    shares = [row.computed for row in listed.calibrated]
    assert shares == sorted(shares, reverse=True)
    kept = latents(sana, cache=True)
    assert np.array_equal(kept.latents, latents(sana, cache=listed.threshold).latents)


def test_the_threshold_is_the_largest_before_the_loss_is_too_large() -> None:
    losses = {0.02: 0.001, 0.05: 0.04, 0.1: 0.07, 0.2: 0.03}
    table = [Calibrated(threshold=one, loss=loss, largest=loss, computed=0.5) for one, loss in losses.items()]
    assert chosen(StepCache(loss=0.05), table, 4, 20).threshold == 0.05
    assert chosen(StepCache(loss=0.0001), table, 4, 20).threshold == 0.0
    assert chosen(StepCache(loss=0.5), table, 4, 20).threshold == 0.2


def test_plans_render_with_it_too_and_adapters_go_with_it(sana: Runtime, tmp_path: Path) -> None:
    plan = sana.plan(PROMPTS[0], size=(64, 32))
    rendered = sana.render(plan, seed=3, steps=10, output="latents", cache=EVERYTHING)
    assert rendered.computed_steps == (4,)
    assert np.array_equal(rendered.latents, latents(sana, [PROMPTS[0]], seed=3, cache=EVERYTHING).latents)
    groups = sana.manifest.engines["step_lora"].lora
    layers = [(layer, group) for group in groups for layer in group.layers]
    generator = np.random.default_rng(1)
    tensors = {}
    for layer, group in layers:
        tensors[f"{layer}.lora_A.weight"] = generator.standard_normal((2, group.in_features)).astype(np.float32) * 0.3
        tensors[f"{layer}.lora_B.weight"] = generator.standard_normal((group.out_features, 2)).astype(np.float32) * 0.3
    save_file(tensors, tmp_path / "adapter.safetensors")
    sana.load_lora(tmp_path / "adapter.safetensors")
    adapted = latents(sana, lora="adapter")
    assert close(latents(sana, lora="adapter", cache=0).latents, adapted.latents)
    assert not close(adapted.latents, latents(sana).latents, 1e-3)


def test_wrong_choices_are_refused(sana: Runtime, build: Build, tmp_path: Path) -> None:
    for choice in (-0.1, float("nan"), "much", 1e9):
        with pytest.raises(RequestError, match="threshold"):
            latents(sana, cache=choice)
    checkpoint = tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=11)
    without = build(checkpoint, tmp_path / "without")
    with pytest.raises(RequestError, match="build … --cache"):
        latents(without, cache=True, steps=2)
    uncalibrated = StepCache(loss=0.05)
    with pytest.raises(RequestError, match="name one"):
        reuse_of(replace(sana.manifest, step_cache=uncalibrated), True, PLAIN)
    with pytest.raises(RequestError, match="--engine step=inductor:fp32"):
        build_bundle(checkpoint, tmp_path / "none", BuildOptions(step_cache=True, target="inductor-cuda"))
    with pytest.raises(RequestError, match="skips"):
        build_bundle(tiny_metacanvas_sdxl(tmp_path / "sdxl"), tmp_path / "none", BuildOptions(step_cache=True))
    with pytest.raises(RequestError, match="cache_loss"):
        BuildOptions(step_cache=True, cache_loss=1.5)


@pytest.mark.parametrize("make", [tiny_metacanvas_flux, pytest.param(tiny_metacanvas_wan, marks=pytest.mark.matrix)])
def test_other_backbones_and_tasks_keep_as_well(
    build: Build, tmp_path: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mc_export.build.step_cache.THRESHOLDS", (0.1,))
    runtime = build(make(tmp_path / "checkpoint"), tmp_path / "bundle", step_cache=True)
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    for case in cases(checkpoint):
        arguments = {**case.arguments(checkpoint), "steps": 4, "output": "latents"}
        whole = runtime.generate(PROMPTS, **arguments)
        assert close(runtime.generate(PROMPTS, **arguments, cache=0).latents, whole.latents, 1e-4)
        kept = runtime.generate(PROMPTS, **arguments, cache=EVERYTHING)
        assert kept.computed_steps == (2, 2)
        assert np.isfinite(kept.latents).all()


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.matrix)])
def test_engines_keep_what_their_programs_keep(tmp_path: Path, target: str) -> None:
    checkpoint = tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=11)
    arguments: dict[str, Any] = {"steps": 4, "size": (64, 32), "seed": [3, 9], "output": "latents"}
    with programs_as_engines(tmp_path / "cache") as build:
        programs = build(checkpoint, tmp_path / "programs", step_cache=True)
        expected = [programs.generate(PROMPTS, **arguments, cache=cache) for cache in (0, EVERYTHING)]
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(target=target, max_steps=4, max_batch=2, step_cache=True))
    runtime = Runtime.load(tmp_path / "bundle", threads=1)
    for cache, one in zip((0, EVERYTHING), expected, strict=True):
        found = runtime.generate(PROMPTS, **arguments, cache=cache)
        assert found.computed_steps == one.computed_steps
        assert close(found.latents, one.latents, 3e-4)


@pytest.mark.matrix
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_parts_are_quantized_on_what_they_are_given(tmp_path: Path, target: str) -> None:
    checkpoint = tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=11)
    engines = {"step": EngineChoice(target, Precision.INT8)}
    build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(engines=engines, max_steps=4, max_batch=2, step_cache=True))
    runtime = Runtime.load(tmp_path / "bundle", threads=1)
    whole = latents(runtime, steps=4)
    assert {runtime.manifest.engines[part].precision for part in ("step_first", "step_rest")} == {Precision.INT8}
    for cache, most in ((0, 0.2), (EVERYTHING, 0.5)):
        kept = latents(runtime, steps=4, cache=cache)
        assert np.linalg.norm(kept.latents - whole.latents) < most * np.linalg.norm(whole.latents)
