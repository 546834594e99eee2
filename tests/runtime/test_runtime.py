"""The whole runtime on engines of a few nodes: numbers, batches, plans, cancelling, and faults on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime import EngineError, RequestError, Result, Runtime, Step
from mc_runtime.backends.base import Engine
from mc_runtime.backends.onnxruntime import OnnxRuntimeBackend
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.sampling.noise import initial_noise
from tests.runtime.fake_bundle import CANVAS, CHANNELS, CONTEXT, expected_latents, sampler_table, write_fake_bundle

PROMPT, OTHER = "a red circle", "a blue square left"
TARGETS: list[Any] = ["onnxruntime", "openvino"]
MIXED = {"planner": "onnxruntime", "step": "openvino", "vae_decoder": "onnxruntime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime.load(write_fake_bundle(folder / "shared"), threads=1)


def engine_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the engines that run once a request, in the order of their runs from now on."""
    runs: list[str] = []
    run = LoadedEngine.run_keeping  # every run is one

    def counted(self: LoadedEngine, *arguments: Any) -> Any:
        runs.append(self.engine.name)
        return run(self, *arguments)

    monkeypatch.setattr(LoadedEngine, "run_keeping", counted)
    return runs


def same(result: Result, other: Result) -> bool:
    return result.latents.tobytes() == other.latents.tobytes()


@pytest.mark.parametrize("target", [*TARGETS, MIXED], ids=["onnxruntime", "openvino", "mixed"])
@pytest.mark.parametrize(("steps", "scale"), [(1, 2.5), (5, 1.0), (7, 4.0)])
def test_latents_equal_a_plain_loop(tmp_path: Path, target: Any, steps: int, scale: float) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", target=target), threads=1)
    plan = runtime.plan(PROMPT, "blue", (40, 24))
    result = runtime.render(plan, steps=steps, guidance_scale=scale, seed=3, num_images=2, output="latents")
    weights = [scale, 1 - scale] if scale > 1 else [1]
    assert result.latents.shape == (2, CHANNELS, 5, 3)
    for index, latents in enumerate(result.latents):
        noise = initial_noise(3 + index, latents.shape)
        expected = expected_latents(noise, plan.branches[: len(weights)], weights, steps, sampler_table())
        np.testing.assert_allclose(latents, expected, atol=2e-5, rtol=1e-5)


def test_plan_is_what_the_planner_gives(runtime: Runtime) -> None:
    plan = runtime.plan(PROMPT, size=(40, 24))
    ids = np.array([2, 3, 4, 6, 1])
    rows = ids + np.arange(5)
    prompt, negative = plan.branches
    np.testing.assert_allclose(prompt.context, rows[:, None] * CONTEXT, rtol=1e-6)
    assert prompt.context_mask.tolist() == [1] * 5
    t, h, w = np.meshgrid([0], np.arange(3), np.arange(2), indexing="ij")  # 16 pixels a token, rounded up
    layout = (t + h + w) / 3 + 5 + rows.mean()
    np.testing.assert_allclose(prompt.canvas, layout[..., None] * CANVAS, rtol=1e-6)
    assert len(negative.context) == 2


def test_stock_bundle_conditions_on_its_text_encoder(tmp_path: Path) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", stock=True), threads=1)
    plan = runtime.plan(PROMPT, "blue")
    prompt, negative = plan.branches
    assert prompt.canvas is None
    # Row 0 and the last six of eight: the second of the five real tokens is not selected.
    np.testing.assert_allclose(prompt.context, np.array([2, 4, 6, 1])[:, None] * CONTEXT)
    np.testing.assert_allclose(negative.context[: int(negative.context_mask.sum())], np.array([5, 1])[:, None] * CONTEXT)
    result = runtime.render(plan, output="latents")
    expected = expected_latents(initial_noise(0, (CHANNELS, 4, 4)), plan.branches, [2.5, -1.5], 4, sampler_table())
    np.testing.assert_allclose(result.latents[0], expected, atol=2e-5)
    with pytest.raises(RequestError, match="no canvas"):
        plan.canvas_map()


def test_pictures_of_the_latents(runtime: Runtime) -> None:
    result = runtime.generate(PROMPT, num_images=2, seed=5, size=(24, 40))
    assert [image.size for image in result.images] == [(40, 24)] * 2
    for image, latents in zip(result.images, result.latents, strict=True):
        pixels = 1 / (1 + np.exp(-latents[:3].astype(np.float64)))
        expected = pixels.repeat(8, axis=1).repeat(8, axis=2).transpose(1, 2, 0) * 255
        assert np.abs(np.asarray(image) - expected).max() <= 0.5 + 1e-3


def test_canvas_map_is_a_picture(runtime: Runtime) -> None:
    assert runtime.plan(PROMPT, size=(24, 40)).canvas_map().mode == "RGB"


@pytest.mark.parametrize("target", TARGETS)
def test_same_seed_same_bytes(folder: Path, target: str) -> None:
    bundle = write_fake_bundle(folder / f"determinism-{target}", target=target)
    first, second = (Runtime.load(bundle, threads=1).generate(PROMPT, seed=11) for _ in range(2))
    assert same(first, second)
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_an_image_does_not_depend_on_its_batch(runtime: Runtime) -> None:
    together = runtime.generate([PROMPT, OTHER], num_images=3, seed=20, output="latents")
    for index, seed in enumerate(together.seeds):
        alone = runtime.generate([PROMPT, OTHER][index // 3], seed=seed, output="latents")
        np.testing.assert_allclose(together.latents[index], alone.latents[0], atol=1e-6)
    assert together.seeds == (20, 21, 22, 23, 24, 25)
    assert len(together.plans) == 2
    assert together.plan is together.plans[0]


def test_prompts_keep_their_negative_prompts(runtime: Runtime) -> None:
    both = runtime.generate([PROMPT, OTHER], negative_prompt=["blue", "red"], seed=[4, 4], output="latents")
    for index, (prompt, negative) in enumerate([(PROMPT, "blue"), (OTHER, "red")]):
        alone = runtime.generate(prompt, negative_prompt=negative, seed=4, output="latents")
        np.testing.assert_allclose(both.latents[index], alone.latents[0], atol=1e-6)
    assert np.abs(both.latents[0] - both.latents[1]).max() > 1e-3


def test_larger_requests_run_in_batches(runtime: Runtime, tmp_path: Path) -> None:
    single = Runtime.load(write_fake_bundle(tmp_path / "bundle", max_batch=1), threads=1)
    steps: list[Step] = []
    result = single.generate(PROMPT, num_images=3, steps=2, seed=1, output="latents", on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(index, 6) for index in range(6)]
    batched = runtime.generate(PROMPT, num_images=3, steps=2, seed=1, output="latents")
    np.testing.assert_allclose(result.latents, batched.latents, atol=1e-6)


def test_ten_images_at_a_batch_of_four(runtime: Runtime) -> None:
    sizes: list[int] = []
    result = runtime.generate(
        PROMPT, num_images=10, steps=1, output="latents", on_step=lambda step: sizes.append(len(step.latents()))
    )
    assert sizes == [4, 4, 2]
    assert len(result.latents) == 10


@pytest.mark.parametrize("target", TARGETS)
def test_engines_with_fixed_shapes(tmp_path: Path, target: str) -> None:
    fixed = {"B": 4, "G": 2, "L": 16, "H": 4, "W": 4}
    bundle = write_fake_bundle(tmp_path / "bundle", target=target, fixed=fixed)
    runtime = Runtime.load(bundle, threads=1)
    for scale, weights in ((3.0, [3.0, -2.0]), (1.0, [1.0])):
        result = runtime.generate(PROMPT, num_images=3, guidance_scale=scale)
        branches = result.plan.branches[: len(weights)]
        assert len(result.images) == 3
        for index, latents in enumerate(result.latents):
            noise = initial_noise(index, latents.shape)
            expected = expected_latents(noise, branches, weights, 4, sampler_table())
            np.testing.assert_allclose(latents, expected, atol=2e-5)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_engines_are_compiled_once_for_what_the_request_will_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: bool, scale: float
) -> None:
    from mc_runtime.backends.openvino import OpenVinoEngine

    compiled: list[str] = []
    compile_for = OpenVinoEngine._compile

    def counted(self: OpenVinoEngine, shapes: Any) -> Any:
        compiled.append(self.name)
        return compile_for(self, shapes)

    monkeypatch.setattr(OpenVinoEngine, "_compile", counted)
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", target="openvino", stock=stock), threads=1)
    runtime.generate([PROMPT, OTHER], negative_prompt="blue", num_images=2, size=(24, 40), guidance_scale=scale)
    assert sorted(compiled) == ["step", "vae_decoder"]
    plan = runtime.plan(PROMPT, "blue", size=(24, 40))
    runtime.render(plan, num_images=4, guidance_scale=scale)
    assert sorted(compiled) == ["step", "vae_decoder"]


def test_warm_up_loads_everything_for_the_default_size(tmp_path: Path) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", target="openvino"), threads=1)
    runtime.warm_up()
    assert sorted(runtime._engines._loading) == ["planner", "step", "vae_decoder"]
    assert len(runtime._engines.get("step").engine._compiled) == 1  # type: ignore[attr-defined]
    runtime.generate(PROMPT)
    assert len(runtime._engines.get("step").engine._compiled) == 1  # type: ignore[attr-defined]


def test_what_did_not_load_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    load, full = OnnxRuntimeBackend.load, [True]

    def load_if_there_is_room(self: OnnxRuntimeBackend, component: str, *arguments: Any) -> Engine:
        if component == "step" and full:
            raise EngineError("step engine: the GPU's memory is full")
        return load(self, component, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "load", load_if_there_is_room)
    for _ in range(2):
        with pytest.raises(EngineError, match="memory is full"):
            runtime.generate(PROMPT)
    full.clear()
    assert same(runtime.generate(PROMPT), Runtime.load(runtime.bundle.path, threads=1).generate(PROMPT))


def test_own_latents_replace_the_noise(runtime: Runtime) -> None:
    noise = np.stack([initial_noise(seed, (CHANNELS, 4, 4)) for seed in (8, 9)])
    given = runtime.generate(PROMPT, num_images=2, latents=noise, output="latents")
    assert same(given, runtime.generate(PROMPT, num_images=2, seed=8, output="latents"))


def test_request_for_latents_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = engine_runs(monkeypatch)
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    result = runtime.generate(PROMPT, guidance_scale=1, output="latents")
    assert result.images == []
    assert runs == ["planner"]


def test_plans_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = engine_runs(monkeypatch)
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    first = runtime.plan(PROMPT)
    assert runs == ["planner"] * 2  # the prompt and the empty negative prompt
    assert runtime.plan(PROMPT.replace(" ", "  ")).branches[0].context is not None  # the same token ids
    runtime.generate(PROMPT, output="latents")
    assert runs == ["planner"] * 2
    again = runtime.plan(PROMPT)
    assert again != first  # plans compare by identity, not by their arrays
    assert again.branches[0].canvas is first.branches[0].canvas
    runtime.plan(PROMPT, size=(64, 64))  # another grid
    assert runs == ["planner"] * 4
    runtime.plan(OTHER)
    assert runs == ["planner"] * 5


def test_without_guidance_the_negative_prompt_is_not_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = engine_runs(monkeypatch)
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    assert len(runtime.generate(PROMPT, guidance_scale=1, output="latents").plan.branches) == 1
    assert runs == ["planner"]


def test_empty_prompt_comes_from_the_bundle_where_its_grid_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = engine_runs(monkeypatch)
    stored = {
        "context": np.full((3, len(CONTEXT)), 7, np.float32),
        "context_mask": np.ones(3, np.int64),
        "canvas": np.full((1, 2, 2, len(CANVAS)), 9, np.float32),
    }
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", empty_plan=stored), threads=1)
    fitting = runtime.plan(PROMPT)
    assert runs == ["planner"]
    np.testing.assert_array_equal(fitting.branches[1].context, stored["context"])
    np.testing.assert_array_equal(fitting.branches[1].canvas, stored["canvas"])
    larger = runtime.plan(PROMPT, size=(64, 64))
    assert runs == ["planner"] * 3
    assert larger.branches[1].canvas.shape == (1, 4, 4, len(CANVAS))
    runtime.plan("")  # as a prompt, the empty text has the prompt's frame
    assert runs == ["planner"] * 4
