"""A LoRA of any backbone, written and loaded by diffusers, gives in a bundle the latents that it gives in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, FluxKontextPipeline, StableDiffusionXLPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan

from mc_runtime import Runtime
from tests.factories_unet import tiny_stock_animatediff, tiny_stock_sdxl
from tests.program_bundle import programs_as_engines
from tests.random_lora import ATTENTION, random_lora
from tests.tiny_flux import tiny_stock_flux
from tests.tiny_wan import tiny_stock_wan

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 3
RANK = 4
TOLERANCE = 1e-3
"""Of the latents' range, in float32."""
FEED_FORWARD = ("net.0.proj", "net.2")


class Stock(NamedTuple):
    """A pipeline, its tiny checkpoint, and the layers that its LoRA changes."""

    pipeline: Any
    checkpoint: Callable[..., Path]
    layers: tuple[str, ...]
    frames: int | None = None


STOCKS = {
    "flux": Stock(
        FluxKontextPipeline,
        lambda folder: tiny_stock_flux(folder, seed=5, num_layers=1, num_single_layers=1),
        (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *FEED_FORWARD, "proj_mlp"),
    ),
    "wan": Stock(WanPipeline, tiny_stock_wan, (*ATTENTION, *FEED_FORWARD), frames=5),
    "sdxl": Stock(StableDiffusionXLPipeline, tiny_stock_sdxl, (*ATTENTION, *FEED_FORWARD)),
    "animatediff": Stock(AnimateDiffPipeline, tiny_stock_animatediff, (*ATTENTION, *FEED_FORWARD), frames=3),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Runtime]]:
    """Builds bundles whose engines are programs that were not exported."""
    with programs_as_engines(tmp_path_factory.mktemp("cache")) as builder:
        yield builder


def latents_of(pipeline: Any, name: str, noise: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    """Final latents of diffusers' pipeline, in our layout."""
    given = torch.from_numpy(noise)
    arguments: dict[str, Any] = {
        "prompt": ["a red circle"] * len(noise), "height": size[0], "width": size[1], "num_inference_steps": STEPS,
        "guidance_scale": scale, "output_type": "latent",
    }  # fmt: skip
    if STOCKS[name].frames is not None:
        found: np.ndarray = pipeline(
            **arguments, negative_prompt=["blurry"] * len(noise), num_frames=STOCKS[name].frames, latents=given
        ).frames.numpy()
        return found
    if name == "flux":
        packed = pipeline._pack_latents(given, *given.shape)
        images = pipeline(**arguments, max_area=size[0] * size[1], latents=packed).images
        return pipeline._unpack_latents(images, *size, 2).numpy()  # type: ignore[no-any-return]
    return pipeline(**arguments, negative_prompt=["blurry"] * len(noise), latents=given).images.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", STOCKS)
def test_latents_equal_diffusers(
    name: str, build: Callable[..., Runtime], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)  # nothing here that ftfy would mend
    stock = STOCKS[name]
    checkpoint = stock.checkpoint(tmp_path / "checkpoint")
    pipeline = stock.pipeline.from_pretrained(str(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    adapter = random_lora(pipeline, tmp_path / "lora", seed=3, rank=RANK, alpha=6.0, layers=list(stock.layers))
    runtime = build(checkpoint, tmp_path / "bundle", lora_rank=RANK)
    runtime.load_lora(adapter, "made")
    multiple = max(16, runtime.manifest.sizes.min)
    latents = runtime.manifest.latents
    for size, count, scale, guidance in [
        ((2 * multiple, multiple), 1, 0.8, 4.0), ((multiple, 2 * multiple), 2, -1.1, 1.0)
    ]:  # fmt: skip
        frames = () if stock.frames is None else (1 + (stock.frames - 1) // latents.frames,)
        shape = (count, latents.channels, *frames, *(side // latents.scale for side in size))
        noise = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
        asked: dict[str, Any] = {"size": size, "steps": STEPS, "guidance_scale": guidance, "output": "latents"}
        asked |= {} if stock.frames is None else {"frames": stock.frames}
        asked |= {} if name == "flux" else {"negative_prompt": "blurry"}
        found = runtime.generate(["a red circle"] * count, latents=noise, lora={"made": scale}, **asked).latents
        plain = latents_of(pipeline, name, noise, size, guidance)
        pipeline.load_lora_weights(str(adapter), adapter_name="made")
        pipeline.set_adapters(["made"], [scale])
        expected = latents_of(pipeline, name, noise, size, guidance)
        pipeline.delete_adapters("made")
        spread = expected.max() - expected.min()
        assert np.abs(found - expected).max() <= TOLERANCE * spread
        assert np.abs(plain - expected).max() >= 5 * TOLERANCE * spread, "the adapter changes something"
