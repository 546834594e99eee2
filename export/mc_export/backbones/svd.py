"""Stable Video Diffusion: a video of a picture (diffusers ``UNetSpatioTemporalConditionModel``,
``StableVideoDiffusionPipeline``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.backbones.spec import Condition, TextStates, TextTokens
from mc_export.backbones.unet import UNet, in_multiples
from mc_export.backbones.unet_attention import tell_context
from mc_runtime.bundle.manifest import Prompting

CLIP_SIDE = 224  # pixels, in the pipeline whatever the encoder's configuration says
MOTION_IDS = 3  # frames a second less one, motion bucket, strength of the picture's noise


class StableVideoDiffusion(UNet):
    """Stable Video Diffusion (arXiv 2311.15127), as ``StableVideoDiffusionPipeline`` runs it.

    Its context is the picture's CLIP embedding, one row; a planner's context takes its place.
    """

    name = "svd"
    model_classes = ("UNetSpatioTemporalConditionModel",)
    tasks = ("image-to-video",)
    canvas_tasks = ("image-to-video",)
    latent_axes = ("T", "H", "W")
    default_guidance = 3.0
    default_steps = 25
    default_frames = 14
    default_fps = 7.0
    guidance_ramp_from = 1.0
    image_encoder = "image_encoder"
    scales_encoded = False

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        # 576 x 1024 pixels, the pipeline's default, where `sample_size` is 96, as published: its area at 16:9.
        multiple = self.size_multiple(config)
        height, width = (round(config.sample_size * ratio / multiple) * multiple for ratio in (3 / 4, 4 / 3))
        return (height, width)

    def video_frames(self, config: Any) -> int | None:
        return int(config.num_frames)

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        return (
            Condition("image_latents", (config.in_channels - config.out_channels, "H", "W"), "image_latents", per_branch=True),
            Condition("motion_ids", (MOTION_IDS,), "motion_ids"),
        )

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = torch.arange(len(drawn["motion_ids"]))
        return {"motion_ids": torch.stack([6.0 + batch, 127.0 + 16 * batch, 0.02 + 0.1 * batch], dim=1)}

    def scalar_layers(self, model: nn.Module) -> Mapping[str, tuple[str, ...]]:
        return {"motion_ids": ("add_time_proj",)}

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        noisy, picture = (in_multiples(model, latents) for latents in (sample, conditions["image_latents"].to(sample.dtype)))
        frames = picture[:, :, None].expand(-1, -1, sample.shape[2], -1, -1)
        return {
            "sample": torch.cat([noisy, frames], dim=1).transpose(1, 2),
            "timestep": timestep,
            "encoder_hidden_states": tell_context(model, sample.shape[0], context, context_mask),
            "added_time_ids": conditions["motion_ids"],
        }

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        return output.transpose(1, 2)

    def zeroes_empty_negative(self, pipeline: Mapping[str, Any]) -> bool:
        return True

    def embed_picture(self, encoder: nn.Module, pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

        side = CLIP_SIDE, CLIP_SIDE
        squeezed = (_resize_with_antialiasing(pixels * 2 - 1, side) + 1) / 2
        shift, scale = (torch.tensor(numbers)[:, None, None].to(pixels) for numbers in (list(mean), list(deviation)))
        embedding: Tensor = encoder((squeezed - shift) / scale).image_embeds
        return embedding[:, None]

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        raise TypeError("Stable Video Diffusion reads no text")

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        raise TypeError("Stable Video Diffusion reads no text")

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return ()
