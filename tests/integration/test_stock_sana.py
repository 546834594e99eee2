"""A bundle of a stock `SanaPipeline` draws what diffusers' pipeline draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

from mc_export.build import BuildOptions, EngineChoice, build_bundle
from mc_runtime import Runtime
from mc_runtime.bundle.manifest import Precision
from tests.factories import tiny_stock_sana

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 6
SCHEDULERS = {
    "flow_euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    # As published SANA checkpoints have it.
    "flow_dpm_solver": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    ),
}


@pytest.fixture(scope="module", params=list(SCHEDULERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime]:
    """The pipeline and the runtime of one checkpoint."""
    folder: Path = tmp_path_factory.mktemp("stock")
    # The same weights and limits as in other tests of a stock pipeline: engines that one has built, the next finds.
    checkpoint = tiny_stock_sana(folder / "checkpoint", scheduler=SCHEDULERS[request.param]())
    report = build_bundle(checkpoint, folder / "bundle", BuildOptions(max_steps=STEPS))
    pipeline = SanaPipeline.from_pretrained(str(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Runtime.load(report.path, threads=1)


@pytest.mark.parametrize("size", [(32, 32), (64, 32)])
@pytest.mark.parametrize("prompts", [["A red circle left of a blue square"], ["a photo of a cat ", "two green triangles"]])
@pytest.mark.parametrize(
    ("scale", "negative"), [(1.0, ""), (4.5, ""), (4.5, "blurry, a Yellow square")], ids=["unguided", "guided", "negative"]
)
def test_final_latents_equal_the_pipelines(
    pair: tuple[Any, Runtime], size: tuple[int, int], prompts: list[str], scale: float, negative: str
) -> None:
    pipeline, runtime = pair
    height, width = size
    noise = np.random.default_rng(5).standard_normal((len(prompts), 4, height // 4, width // 4)).astype(np.float32)
    expected = pipeline(
        prompts,
        negative_prompt=negative,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=torch.from_numpy(noise),
        use_resolution_binning=False,
        output_type="latent",
    ).images.numpy()
    result = runtime.generate(
        prompts, negative_prompt=negative, size=size, steps=STEPS, guidance_scale=scale, latents=noise, output="latents"
    )
    error = np.abs(result.latents - expected)
    spread = expected.max() - expected.min()
    assert error.max() <= 1e-3 * spread, f"max {error.max():.2e}, mean {error.mean():.2e}, range {spread:.2f}"


def test_pictures_equal_the_pipelines(pair: tuple[Any, Runtime]) -> None:
    pipeline, runtime = pair
    noise = np.random.default_rng(6).standard_normal((2, 4, 8, 8)).astype(np.float32)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "use_resolution_binning": False}
    expected = pipeline("a cat", num_images_per_prompt=2, latents=torch.from_numpy(noise), height=32, width=32, **arguments)
    result = runtime.generate("a cat", num_images=2, latents=noise, steps=STEPS, guidance_scale=3.0, size=(32, 32))
    for ours, theirs in zip(result.images, expected.images, strict=True):
        difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16))
        assert difference.max() <= 1, "a value may round to the next of 256 steps"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_text_encoder_in_int8_reads_what_the_float_one_reads(
    pair: tuple[Any, Runtime], target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its rows are chosen from the front: calibration and both prompts, which are of unlike lengths, take the same way."""
    if "flow_euler" not in request.node.name:
        pytest.skip("the text encoder knows nothing of the scheduler")
    _, runtime = pair
    options = BuildOptions(max_steps=STEPS, engines={"text_encoder": EngineChoice(target, Precision.INT8)})
    report = build_bundle(runtime.bundle.path.parent / "checkpoint", tmp_path / "bundle", options)
    assert {engine.component for engine in report.engines if engine.state == "built"} == {"text_encoder"}
    plans = [each.plan("two Green triangles ", "blurry") for each in (runtime, Runtime.load(report.path, threads=1))]
    for exact, rounded in zip(plans[0].branches, plans[1].branches, strict=True):
        assert exact.context.shape == rounded.context.shape
        np.testing.assert_array_equal(exact.context_mask, rounded.context_mask)
        error = np.linalg.norm(rounded.context - exact.context) / np.linalg.norm(exact.context)
        assert 1e-4 < error < 0.1
    assert Runtime.load(report.path, threads=1).generate("a cat", steps=1).images[0].size == (32, 32)
