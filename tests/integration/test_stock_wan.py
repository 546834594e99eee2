"""A bundle of a stock Wan pipeline makes the videos that diffusers' pipelines make: from text, and from a first frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image

from mc_export.build import BuildOptions, build_bundle
from mc_runtime import Runtime
from tests.tiny_wan import tiny_stock_wan

pytestmark = [pytest.mark.integration, pytest.mark.matrix]

STEPS = 4
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 255, (50, 70, 3), np.uint8))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime]:
    """The image-to-video pipeline and the runtime of one checkpoint, which serves both tasks."""
    folder: Path = tmp_path_factory.mktemp("wan")
    checkpoint = tiny_stock_wan(folder / "checkpoint", image_to_video=True)
    build_bundle(checkpoint, folder / "bundle", BuildOptions(max_steps=STEPS, max_batch=2))
    return WanImageToVideoPipeline.from_pretrained(str(checkpoint)), Runtime.load(folder / "bundle", threads=1)


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of these tests hold nothing that ftfy would mend; it is no dependency of ours."""
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)


@pytest.mark.parametrize(
    ("image", "size", "frames", "prompts", "scale"),
    [
        (None, (64, 96), 5, ["a red circle"], 5.0),
        (None, (96, 64), 13, ["a cat", "two green triangles &amp; a square"], 1.0),
        (PICTURE, (64, 96), 9, ["a red circle"], 5.0),
        (PICTURE, (96, 64), 5, ["a  cat"], 1.0),
    ],
    ids=["text", "text-two-unguided", "image", "image-unguided"],
)
def test_videos_equal_the_pipelines(
    pair: tuple[Any, Runtime],
    image: Image.Image | None,
    size: tuple[int, int],
    frames: int,
    prompts: list[str],
    scale: float,
) -> None:
    pipeline, runtime = pair
    if image is None:
        parts = {name: part for name, part in pipeline.components.items() if not name.startswith("image_")}
        pipeline = WanPipeline(**parts, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    latents = runtime.manifest.latents
    shape = (len(prompts), latents.channels, 1 + (frames - 1) // latents.frames, *(side // latents.scale for side in size))
    noise = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    arguments: dict[str, Any] = {
        "prompt": prompts, "negative_prompt": ["blurry"] * len(prompts) if scale > 1 else None, "height": size[0],
        "width": size[1], "num_frames": frames, "num_inference_steps": STEPS, "guidance_scale": scale,
    }  # fmt: skip
    arguments |= {"image": image} if image else {}
    media: dict[str, Any] = {"frames": frames} | ({"image": image} if image else {})
    result = runtime.generate(
        prompts, negative_prompt="blurry", size=size, steps=STEPS, guidance_scale=scale, latents=noise, **media
    )
    expected = pipeline(**arguments, latents=torch.from_numpy(noise), output_type="latent").frames.numpy()
    if image is None:  # the other pipeline gives its latents without the first frame put back
        error, spread = np.abs(result.latents - expected).max(), expected.max() - expected.min()
        assert error <= 1e-3 * spread, f"{error:.2e} of {spread:.2f}"
    seen = pipeline(**arguments, latents=torch.from_numpy(noise), output_type="np").frames
    ours = np.stack([clip.frames for clip in result.clips]).astype(np.float64)
    assert ours.shape == (len(prompts), frames, *size, 3)
    assert np.abs(ours - seen * 255).max() <= 0.51, "more than rounding to bytes"
