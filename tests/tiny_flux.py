"""Tiny random FLUX checkpoints, saved by diffusers itself, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.factories import save_metacanvas
from tests.tiny_tokenizers import clip_tokenizer, t5_tokenizer

FLUX_DIM, FLUX_CONTEXT_DIM, FLUX_POOLED_DIM, FLUX_CHANNELS = 64, 48, 32, 4
Model = TypeVar("Model", bound=nn.Module)
PIPELINES = {"flux": FluxPipeline, "flux-kontext": FluxKontextPipeline}


def randomized(model: Model, seed: int) -> Model:
    """Norms and biases too: what starts at one or zero hides what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_flux(seed: int, **overrides: Any) -> FluxTransformer2DModel:
    """A random FLUX, 64 wide, two double and two single blocks."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 4 * FLUX_CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 4, "joint_attention_dim": FLUX_CONTEXT_DIM, "pooled_projection_dim": FLUX_POOLED_DIM,
        "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    return randomized(FluxTransformer2DModel(**{**config, **overrides}), seed)


def tiny_kl_vae(seed: int, channels: int = FLUX_CHANNELS) -> AutoencoderKL:
    """A random AutoencoderKL of FLUX's kind (shifted latents, no quantising convolutions), 2 pixels a latent cell."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomized(vae, seed)


def tiny_flux_text(seed: int) -> dict[str, Any]:
    """CLIP and T5 with their tokenizers, by the names of a pipeline's components."""
    torch.manual_seed(seed)
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=FLUX_POOLED_DIM, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=FLUX_CONTEXT_DIM, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {
        "text_encoder": randomized(CLIPTextModel(clip_config), seed),
        "tokenizer": clip,
        "text_encoder_2": randomized(T5EncoderModel(t5_config), seed),
        "tokenizer_2": t5,
    }


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As FLUX.1-dev and -Kontext have it: shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )


@contextmanager
def small_pictures_to_edit() -> Iterator[None]:
    """What FLUX.1-Kontext brings pictures to has a thousand pixels while this lasts, not a million.

    A tiny autoencoder has two pixels a cell, not eight: the published sizes would be 65536 tokens of reference.
    """
    sizes = [(24, 48), (32, 36), (36, 32), (48, 24)]
    with patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes):
        yield


def tiny_stock_flux(folder: Path, seed: int = 0, kind: str = "flux-kontext", scheduler: Any = None, **overrides: Any) -> Path:
    """A stock pipeline folder, saved by diffusers; `kind` is the backbone's name, `overrides` are the transformer's."""
    PIPELINES[kind](
        transformer=tiny_flux(seed + 1, **overrides),
        vae=tiny_kl_vae(seed + 2),
        scheduler=scheduler or flux_scheduler(),
        **tiny_flux_text(seed + 3),
    ).save_pretrained(str(folder))
    return folder


def tiny_metacanvas_flux(
    folder: Path,
    seed: int = 0,
    conditioning: str = "planner",
    random_projections: bool = True,
    kind: str = "flux-kontext",
    **settings: Any,
) -> Path:
    """A MetaCanvas checkpoint of FLUX: canvas 1 x 4 x 4 on 32 x 32 pixels, 8 x 8 tokens (so it is interpolated)."""
    components: dict[str, Any] = {
        "transformer": tiny_flux(seed + 1),
        "vae": tiny_kl_vae(seed + 2),
        "scheduler": flux_scheduler(),
    }
    if conditioning == "text_encoder":
        components |= tiny_flux_text(seed + 3)
    canvas = {
        "tasks": ("text-to-image", "image-editing"), "conditioning": conditioning,
        "canvas": {"grid": (1, 4, 4), "pixels_per_token": 8}, **settings,
    }  # fmt: skip
    widths = (FLUX_DIM, FLUX_CONTEXT_DIM, FLUX_POOLED_DIM)
    return save_metacanvas(folder, seed, components, PIPELINES[kind].__name__, canvas, widths, random_projections)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, C, H, W]` as the model's tokens, by diffusers' own function."""
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)
