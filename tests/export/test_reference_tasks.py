"""The reference makes of a request's pictures what diffusers' pipelines make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, StableVideoDiffusionPipeline, WanImageToVideoPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image

from mc_export.reference import ReferencePipeline
from mc_runtime.errors import RequestError
from tests.export.backbones.drive import assert_same_latents
from tests.factories_unet import tiny_stock_svd
from tests.tiny_flux import FLUX_CHANNELS, tiny_stock_flux
from tests.tiny_wan import CHANNELS, tiny_metacanvas_wan, tiny_stock_wan

STEPS = 3
PICTURE = Image.fromarray(np.random.default_rng(2).integers(0, 255, (50, 90, 3), np.uint8))


def noise_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def both(pipeline_class: Any, folder: Path) -> tuple[Any, ReferencePipeline]:
    pipeline = pipeline_class.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, ReferencePipeline.from_checkpoint(folder)


@pytest.mark.parametrize(("frames", "scale"), [(3, 3.0), (2, 1.0)], ids=["ramp", "unguided"])
def test_stable_video_diffusion(tmp_path: Path, frames: int, scale: float) -> None:
    pipeline, reference = both(StableVideoDiffusionPipeline, tiny_stock_svd(tmp_path / "svd", seed=4))
    noise = noise_of(1, 4, frames, 8, 12)
    expected = pipeline(
        PICTURE, height=16, width=24, num_frames=frames, num_inference_steps=STEPS, max_guidance_scale=scale, fps=9,
        motion_bucket_id=90, noise_aug_strength=0.0, latents=torch.from_numpy(noise).transpose(1, 2), output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    result = reference.generate(
        "", image=PICTURE, size=(16, 24), frames=frames, steps=STEPS, guidance_scale=scale, fps=9.0, motion_bucket=90,
        noise_augmentation=0.0, latents=noise,
    )  # fmt: skip
    assert_same_latents(torch.from_numpy(result.latents), expected)
    assert [clip.shape for clip in result.clips] == [(frames, 16, 24, 3)]


def test_stable_video_diffusion_needs_a_picture_and_draws_its_noise_by_seed(tmp_path: Path) -> None:
    _, reference = both(StableVideoDiffusionPipeline, tiny_stock_svd(tmp_path / "svd", seed=4))
    with pytest.raises(RequestError, match="nothing from a prompt alone"):
        reference.generate("")
    asked: dict[str, Any] = {"image": PICTURE, "size": (16, 16), "frames": 2, "steps": 1, "noise_augmentation": 0.5}
    together = reference.generate("", num_images=2, seed=[3, 4], **asked).latents
    alone = torch.from_numpy(reference.generate("", seed=4, **asked).latents[0])
    assert_same_latents(torch.from_numpy(together[1]), alone)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.parametrize(("image", "true_cfg"), [(None, 2.5), (PICTURE, 1.0), (PICTURE, 3.0)], ids=["text", "edit", "true-cfg"])
def test_flux_kontext(
    tmp_path: Path, image: Image.Image | None, true_cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(24, 48), (48, 28), (36, 32)])
    folder = tiny_stock_flux(tmp_path / "flux", seed=5, num_layers=1, num_single_layers=1)
    pipeline, reference = both(FluxKontextPipeline, folder)
    prompts, noise = ["make it red", "a square"], noise_of(2, FLUX_CHANNELS, 18, 10)
    expected = pipeline(
        prompt=prompts, image=image, height=36, width=20, max_area=36 * 20, num_inference_steps=STEPS, guidance_scale=4.3,
        negative_prompt=["blurry"] * 2, true_cfg_scale=true_cfg,
        latents=pipeline._pack_latents(torch.from_numpy(noise), *noise.shape), output_type="latent",
    ).images  # fmt: skip
    media = {} if image is None else {"image": image}
    result = reference.generate(
        prompts, negative_prompt="blurry", size=(36, 20), steps=STEPS, guidance_scale=4.3, true_cfg_scale=true_cfg,
        latents=noise, output="latents", **media,
    )  # fmt: skip
    assert_same_latents(torch.from_numpy(result.latents), pipeline._unpack_latents(expected, 36, 20, 2))


def test_wan_begins_with_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)
    pipeline, reference = both(WanImageToVideoPipeline, tiny_stock_wan(tmp_path / "wan", seed=6, image_to_video=True))
    noise = noise_of(1, CHANNELS, 2, 4, 6)
    expected = pipeline(
        PICTURE, "a red circle", negative_prompt="blurry", height=32, width=48, num_frames=5, num_inference_steps=STEPS,
        guidance_scale=3.0, latents=torch.from_numpy(noise), output_type="latent",
    ).frames  # fmt: skip
    result = reference.generate(
        "a red circle", negative_prompt="blurry", image=PICTURE, size=(32, 48), frames=5, steps=STEPS, guidance_scale=3.0,
        latents=noise, output="latents",
    )  # fmt: skip
    assert_same_latents(torch.from_numpy(result.latents), expected)


def test_every_input_of_a_clip_model_changes_its_video(tmp_path: Path) -> None:
    tasks = ("text-to-video", "image-to-video", "in-context-video", "video-editing")
    reference = ReferencePipeline.from_checkpoint(tiny_metacanvas_wan(tmp_path / "wan", seed=8, tasks=tasks))
    clip = np.random.default_rng(1).integers(0, 255, (7, 40, 30, 3), np.uint8)
    asked: dict[str, Any] = {"size": (64, 96), "steps": 1, "guidance_scale": 1.0, "output": "latents"}
    made = [
        reference.generate("a circle", **asked, **media).latents
        for media in (
            {"frames": 5},
            {"frames": 5, "image": PICTURE},
            {"frames": 5, "image": PICTURE, "task": "in-context-video"},
            {"frames": 5, "image": [PICTURE, PICTURE.rotate(180)]},
            {"video": clip, "fps": 8.0},
        )
    ]
    assert {latents.shape for latents in made} == {(1, CHANNELS, 2, 8, 12)}, "7 frames are cut to 5"
    for index, latents in enumerate(made):
        assert all(np.abs(latents - other).max() > 1e-3 for other in made[:index])
    with pytest.raises(RequestError, match="cannot do image-editing; it can do text-to-video"):
        reference.generate("a circle", task="image-editing", image=PICTURE)
