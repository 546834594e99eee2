"""Bundles of stock SDXL, AnimateDiff and Stable Video Diffusion make what diffusers' pipelines make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, StableDiffusionXLPipeline, StableVideoDiffusionPipeline
from PIL import Image

from mc_export.build import BuildOptions, build_bundle
from mc_runtime import Runtime
from tests.factories_unet import tiny_stock_animatediff, tiny_stock_sdxl, tiny_stock_svd

pytestmark = [pytest.mark.integration, pytest.mark.matrix]

STEPS = 4


def pair(folder: Path, make: Callable[..., Path], pipeline: Any) -> tuple[Any, Runtime]:
    """The pipeline and the runtime of one checkpoint."""
    checkpoint = make(folder / "checkpoint", seed=7)
    build_bundle(checkpoint, folder / "bundle", BuildOptions(max_steps=STEPS, max_batch=2))
    loaded = pipeline.from_pretrained(str(checkpoint))
    loaded.set_progress_bar_config(disable=True)
    return loaded, Runtime.load(folder / "bundle", threads=1)


def noise_for(runtime: Runtime, count: int, size: tuple[int, int], frames: int | None = None) -> np.ndarray:
    """Unit noise in our layout."""
    latents = runtime.manifest.latents
    extents = (*([frames] if frames else []), *(side // latents.scale for side in size))
    return np.random.default_rng(7).standard_normal((count, latents.channels, *extents)).astype(np.float32)


def check(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Final latents."""
    error, spread = np.abs(ours - theirs).max(), theirs.max() - theirs.min()
    assert error <= 1e-3 * spread, f"{error:.2e} of {spread:.2f}"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime]:
    return pair(tmp_path_factory.mktemp("sdxl"), tiny_stock_sdxl, StableDiffusionXLPipeline)


@pytest.mark.parametrize("negative", [None, "blurry"])
@pytest.mark.parametrize(
    ("sides", "prompts", "scale"),
    [((2, 3), ["a red circle"], 5.0), ((3, 2), ["a cat", "two squares"], 1.0)],
    ids=["one", "two"],
)
def test_sdxl(
    sdxl: tuple[Any, Runtime], sides: tuple[int, int], prompts: list[str], scale: float, negative: str | None
) -> None:
    pipeline, runtime = sdxl
    multiple = max(8, runtime.manifest.sizes.multiple)  # the pipeline wants multiples of 8
    height, width = size = (sides[0] * multiple, sides[1] * multiple)
    noise = noise_for(runtime, len(prompts), size)
    arguments: dict[str, Any] = {
        "prompt": prompts, "negative_prompt": negative and [negative] * len(prompts), "height": height, "width": width,
        "num_inference_steps": STEPS, "guidance_scale": scale,
    }  # fmt: skip
    result = runtime.generate(
        prompts, negative_prompt=negative or "", size=size, steps=STEPS, guidance_scale=scale, latents=noise
    )
    latents = torch.from_numpy(noise)
    check(result.latents, pipeline(**arguments, latents=latents, output_type="latent").images.numpy())
    seen = pipeline(**arguments, latents=latents, output_type="np").images
    ours = np.stack([np.asarray(image, np.float64) for image in result.images])
    assert np.abs(ours - seen * 255).max() <= 0.51


@pytest.fixture(scope="module")
def animatediff(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime]:
    return pair(tmp_path_factory.mktemp("animatediff"), tiny_stock_animatediff, AnimateDiffPipeline)


@pytest.mark.parametrize(
    ("frames", "prompts", "scale"), [(5, ["a red circle"], 5.0), (3, ["a cat", "two squares"], 1.0)], ids=["one", "two"]
)
def test_animatediff(animatediff: tuple[Any, Runtime], frames: int, prompts: list[str], scale: float) -> None:
    pipeline, runtime = animatediff
    multiple = max(8, runtime.manifest.sizes.multiple)  # the pipeline wants multiples of 8
    height, width = size = (2 * multiple, 3 * multiple)
    noise = noise_for(runtime, len(prompts), size, frames)
    arguments: dict[str, Any] = {
        "prompt": prompts, "negative_prompt": ["blurry"] * len(prompts), "height": height, "width": width,
        "num_frames": frames, "num_inference_steps": STEPS, "guidance_scale": scale,
    }  # fmt: skip
    result = runtime.generate(
        prompts, negative_prompt="blurry", size=size, steps=STEPS, guidance_scale=scale, latents=noise, frames=frames
    )
    latents = torch.from_numpy(noise)
    check(result.latents, pipeline(**arguments, latents=latents, output_type="latent").frames.numpy())
    seen = pipeline(**arguments, latents=latents, output_type="np").frames
    assert np.abs(np.stack([clip.frames for clip in result.clips]) - seen * 255.0).max() <= 0.51


@pytest.fixture(scope="module")
def svd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime]:
    return pair(tmp_path_factory.mktemp("svd"), tiny_stock_svd, StableVideoDiffusionPipeline)


@pytest.mark.parametrize(("frames", "scale"), [(5, 3.0), (2, 1.0)], ids=["ramp", "unguided"])
def test_svd(svd: tuple[Any, Runtime], frames: int, scale: float) -> None:
    pipeline, runtime = svd
    multiple = max(8, runtime.manifest.sizes.multiple)  # the pipeline wants multiples of 8
    height, width = size = (2 * multiple, 3 * multiple)
    coarse = np.random.default_rng(9).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((64, 50), Image.Resampling.BICUBIC)
    noise = noise_for(runtime, 1, size, frames)
    arguments: dict[str, Any] = {
        "height": height, "width": width, "num_frames": frames, "num_inference_steps": STEPS, "max_guidance_scale": scale,
        "fps": 9, "motion_bucket_id": 90, "noise_aug_strength": 0.0,
    }  # fmt: skip
    media = {"image": picture, "frames": frames, "fps": 9.0, "motion_bucket": 90, "noise_augmentation": 0.0}
    result = runtime.generate("", size=size, steps=STEPS, guidance_scale=scale, latents=noise, **media)
    latents = torch.from_numpy(noise).transpose(1, 2)
    check(result.latents, pipeline(picture, **arguments, latents=latents, output_type="latent").frames.transpose(1, 2).numpy())
    seen = pipeline(picture, **arguments, latents=latents, output_type="np").frames
    assert np.abs(np.stack([clip.frames for clip in result.clips]) - seen * 255.0).max() <= 0.51


def test_svd_noise_is_of_the_seed(svd: tuple[Any, Runtime]) -> None:
    _, runtime = svd
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 40, 3), np.uint8))
    size = (2 * runtime.manifest.sizes.multiple,) * 2
    media = {"image": picture, "frames": 2, "noise_augmentation": 0.5, "steps": 1, "size": size}
    both = runtime.generate("", num_images=2, seed=[3, 4], **media).latents
    np.testing.assert_allclose(both[1], runtime.generate("", seed=4, **media).latents[0], atol=1e-5)
    assert np.abs(both[0] - both[1]).max() > 1e-2
