"""A bundle of a stock FLUX.1-Kontext draws and edits what diffusers' pipeline draws and edits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from mc_export.build import BuildOptions, build_bundle
from mc_runtime import Runtime
from tests.tiny_flux import FLUX_CHANNELS, small_pictures_to_edit, tiny_stock_flux

pytestmark = [pytest.mark.integration, pytest.mark.matrix]

STEPS = 4
SIZES = ((36, 20), (32, 32))
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 255, (50, 90, 3), np.uint8))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Runtime]]:
    """The pipeline and the runtime of one checkpoint; pictures to edit are of sizes that suit tiny latents."""
    folder: Path = tmp_path_factory.mktemp("flux")
    with small_pictures_to_edit():
        checkpoint = tiny_stock_flux(folder / "checkpoint", seed=5, num_layers=1, num_single_layers=1)
        build_bundle(checkpoint, folder / "bundle", BuildOptions(max_steps=STEPS, max_batch=2))
        pipeline = FluxKontextPipeline.from_pretrained(str(checkpoint))
        pipeline.set_progress_bar_config(disable=True)
        yield pipeline, Runtime.load(folder / "bundle", threads=1)


@pytest.mark.parametrize(
    ("image", "size", "prompts", "scale", "true_cfg"),
    [
        (None, SIZES[0], ["a red circle"], 4.3, 1.0),
        (PICTURE, SIZES[0], ["make the circle blue"], 4.3, 3.0),
        (PICTURE, SIZES[1], ["make the circle blue", "remove the square"], 2.5, 1.0),
    ],
    ids=["text", "edit-true-cfg", "two-edits"],
)
def test_pictures_equal_the_pipelines(
    pair: tuple[Any, Runtime],
    image: Image.Image | None,
    size: tuple[int, int],
    prompts: list[str],
    scale: float,
    true_cfg: float,
) -> None:
    pipeline, runtime = pair
    height, width = size
    shape = (len(prompts), FLUX_CHANNELS, height // 2, width // 2)
    noise = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    arguments: dict[str, Any] = {
        "prompt": prompts, "image": image, "height": height, "width": width, "max_area": height * width,
        "num_inference_steps": STEPS, "guidance_scale": scale,
        "negative_prompt": ["blurry"] * len(prompts), "true_cfg_scale": true_cfg,
        "latents": pipeline._pack_latents(torch.from_numpy(noise), *shape),
    }  # fmt: skip
    asked: dict[str, Any] = {"image": image} if image else {}
    if true_cfg > 1:
        asked |= {"negative_prompt": "blurry", "true_cfg_scale": true_cfg}
    result = runtime.generate(prompts, size=size, steps=STEPS, guidance_scale=scale, latents=noise, **asked)
    expected = pipeline._unpack_latents(pipeline(**arguments, output_type="latent").images, height, width, 2).numpy()
    error, spread = np.abs(result.latents - expected).max(), expected.max() - expected.min()
    assert error <= 1e-3 * spread, f"{error:.2e} of {spread:.2f}"
    seen = pipeline(**arguments, output_type="np").images
    for ours, theirs in zip(result.images, seen, strict=True):
        assert np.abs(np.asarray(ours) / 255 - theirs).mean() <= 1 / 255
