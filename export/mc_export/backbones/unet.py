"""What SDXL, AnimateDiff and Stable Video Diffusion share: diffusers' UNets, with the canvas behind `conv_in`.

A UNet has no patches: `conv_in` turns every latent cell into a vector, so the canvas is added at the latents' resolution.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, ClassVar

import diffusers
import torch
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.unet_attention import (
    UNetContext,
    is_prepared,
    prepared_width,
    take_masks,
    take_prepared_context,
)


class UNet(Backbone):
    """A UNet whose context enters by cross-attention; frames of a video are folded into its batch, sample by sample."""

    component = "unet"
    patch_embedding = "conv_in"
    #: What configurations of the class may say that the pipeline's own never do, and the only value supported.
    plain: ClassVar[dict[str, Any]] = {}
    uncut = "a UNet's skips take the first block's result to its end, so that no residual stands for all that is between"

    def refusal(self, config: Any) -> str | None:
        for key, value in self.plain.items():
            if config.get(key) != value:
                return f"{key} is {config.get(key)!r}; only {value!r} is supported for {self.name}"
        if not isinstance(config.cross_attention_dim, int):
            return f"cross_attention_dim is {config.cross_attention_dim!r}; it must be one number for all blocks"
        return None

    def width(self, config: Any) -> int:
        return int(config.block_out_channels[0])

    def context_width(self, config: Any) -> int:
        return int(config.cross_attention_dim)

    def latent_channels(self, config: Any) -> int:
        return int(config.out_channels)

    def patch(self, config: Any) -> tuple[int, int, int]:
        return (1, 1, 1)

    def size_multiple(self, config: Any) -> int:
        # Other sizes diffusers interpolates on the way up, by another path for each remainder.
        return int(2 ** (len(config.block_out_channels) - 1))

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        size = config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def timestep_scale(self, config: Any) -> float:
        return 1.0

    def timestep_layers(self, model: nn.Module) -> tuple[str, ...]:
        return ("time_proj",)

    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        frames = sample.shape[2] if sample.ndim == 5 else 1
        return tokens.unflatten(0, (sample.shape[0], frames)).movedim(2, -1)

    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        return tokens + residual.flatten(0, 1).movedim(-1, 1)

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        return output

    def adopt(self, model: nn.Module) -> None:
        take_masks(model)

    def prepare_for_export(self, model: nn.Module) -> None:
        take_prepared_context(model)

    def prepared_context_width(self, config: Any) -> int:
        return _prepared_width(self.model_classes[0], json.dumps(dict(config), sort_keys=True, default=str))

    def context_preparation(self, model: nn.Module) -> nn.Module:
        return UNetContext(model)


def in_multiples(model: nn.Module, latents: Tensor) -> Tensor:
    """The same latents, for a prepared model with their sizes said as multiples of its coarsest cells.

    The exporter's sizes then stay short terms all the way down and up; otherwise a video's UNet takes it minutes of algebra.
    """
    if not is_prepared(model):
        return latents
    config: Any = model.config
    multiple = 2 ** (len(config.block_out_channels) - 1)
    height, width = (extent // multiple * multiple for extent in latents.shape[-2:])
    return latents.narrow(-2, 0, height).narrow(-1, 0, width)


def repeated_over_frames(rows: Tensor, frames: int) -> Tensor:
    """Every row once for each frame of its video: `[N, ...]` to `[N * frames, ...]`.

    It is `repeat_interleave`, which the ONNX exporter gets wrong where the number is symbolic.
    """
    return rows[:, None].expand(-1, frames, *(-1,) * (rows.ndim - 1)).flatten(0, 1)


@cache
def _prepared_width(model_class: str, config: str) -> int:
    """Of a model of this configuration, without its weights."""
    with torch.device("meta"):
        return prepared_width(getattr(diffusers, model_class).from_config(json.loads(config)))
