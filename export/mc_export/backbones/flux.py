"""FLUX.1: an MMDiT of double and single stream blocks with embedded guidance (diffusers ``FluxTransformer2DModel``).

Latents `[B, 16, H, W]` are packed into tokens of 2 x 2 cells here, and unpacked again. Text, noisy target and reference picture
are one sequence for attention; each has its own rotary positions (first axis: 0 for the target, 1 for the reference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.flux_export import GUIDANCE_SINUSOIDS, TIMESTEP_SINUSOIDS, prepare_flux
from mc_export.backbones.flux_stream import PATCH, FluxStream, KontextStream
from mc_export.backbones.flux_text import flux_prompting, flux_states, flux_timesteps, flux_tokens
from mc_export.backbones.spec import Condition, EncoderFolders, TextStates, TextTokens
from mc_export.backbones.stream import BlockStream
from mc_export.program.base import Axis
from mc_export.sampler import SetTimesteps
from mc_runtime.bundle.manifest import Prompting

MASK_BIAS = -10000.0  # exp() of it is 0 in every float format
SCALE_OF_TIMESTEPS = 1000  # the model takes timesteps in [0, 1] and multiplies them itself
LARGEST_REFERENCE = 98  # tokens along the longer side of the sizes Kontext was trained on, 1568 pixels


class Flux(Backbone):
    """FLUX.1-dev and FLUX.1-schnell, as ``FluxPipeline`` runs them: text-to-image."""

    name = "flux"
    model_classes = ("FluxTransformer2DModel",)
    pipelines = ("FluxPipeline",)
    component = "transformer"
    patch_embedding = "x_embedder"
    tasks: ClassVar[tuple[str, ...]] = ("text-to-image",)
    canvas_tasks = ("text-to-image", "image-editing")
    default_guidance = 3.5
    default_steps = 28
    encoders = (EncoderFolders("text_encoder", "tokenizer"), EncoderFolders("text_encoder_2", "tokenizer_2"))
    config_names_size = False
    guidance_branches = 2
    embeds_guidance = True
    prepares_layers = False
    stream: ClassVar[BlockStream | None] = FluxStream()

    def refusal(self, config: Any) -> str | None:
        if (config.out_channels or config.in_channels) == config.in_channels:
            return None
        return (
            f"takes {config.in_channels} channels and gives {config.out_channels}; FLUX models that concatenate a control "
            "picture along channels are not supported"
        )

    def width(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    def context_width(self, config: Any) -> int:
        return int(config.joint_attention_dim)

    def pooled_width(self, config: Any) -> int:
        return int(config.pooled_projection_dim)

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels) // PATCH**2

    def patch(self, config: Any) -> tuple[int, int, int]:
        return (1, PATCH, PATCH)

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        return (128, 128)

    def timestep_scale(self, config: Any) -> float:
        return 1.0

    def timestep_layers(self, model: nn.Module) -> tuple[str, ...]:
        return (TIMESTEP_SINUSOIDS,)

    def scalar_layers(self, model: Any) -> Mapping[str, tuple[str, ...]]:
        return {"guidance_scale": (GUIDANCE_SINUSOIDS,)} if model.config.guidance_embeds else {}

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        pooled = Condition("pooled", (self.pooled_width(config),), "pooled", per_branch=True)
        guidance = Condition("guidance_scale", (), "guidance_scale")
        return (pooled, guidance) if config.guidance_embeds else (pooled,)

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Guidance scales that bf16 cannot hold."""
        if "guidance_scale" not in drawn:
            return {}
        return {"guidance_scale": torch.linspace(2.3, 4.7, len(drawn["guidance_scale"]))}

    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        height, width = _grid(sample)
        return tokens[:, : height * width].unflatten(1, (1, height, width))

    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        residual = residual.flatten(1, 3)
        count = residual.shape[1]
        return torch.cat([tokens[:, :count] + residual, tokens[:, count:]], dim=1)

    def arguments(
        self, model: Any, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        tokens, positions = [packed(sample)], [positions_of(sample, 0)]
        counts = [context_mask.to(sample.dtype), torch.ones_like(tokens[0][..., 0])]
        if "reference" in conditions:
            reference = conditions["reference"].to(sample.dtype)
            tokens.append(packed(reference))
            positions.append(positions_of(reference, 1))
            counts.append(conditions["has_reference"].to(sample.dtype)[:, None].expand(-1, tokens[1].shape[1]))
        guidance = conditions.get("guidance_scale")
        return {
            "hidden_states": torch.cat(tokens, dim=1),
            "timestep": timestep / SCALE_OF_TIMESTEPS,
            "guidance": guidance,
            "pooled_projections": conditions["pooled"].to(sample.dtype),
            "encoder_hidden_states": context,
            "txt_ids": torch.zeros(context.shape[1], 3, device=sample.device),
            "img_ids": torch.cat(positions),
            "joint_attention_kwargs": {"attention_mask": ((1 - torch.cat(counts, dim=1)) * MASK_BIAS)[:, None, None]},
        }

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        height, width = _grid(sample)
        cells = output[:, : height * width].unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height, width))
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def prepare_for_export(self, model: nn.Module) -> None:
        prepare_flux(model)

    def use_kernels(self, model: nn.Module) -> Mapping[str, int]:
        from mc_export.rewrites.flux import use_flux_kernels

        return use_flux_kernels(model)

    def prepared_context_width(self, config: Any) -> int:
        return self.width(config)

    def context_preparation(self, model: Any) -> nn.Module:
        """The embedding alone: the text stream attends to the noisy target from the first block on."""
        embedder: nn.Module = model.context_embedder
        return embedder

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        return flux_states(encoders, input_ids, attention_masks)

    def context_rows(self, lengths: Sequence[str]) -> str:
        return lengths[1]

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        return flux_tokens(tokenizers, prompts)

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return flux_prompting(tokenizers, files)

    def set_timesteps(self, scheduler: Any) -> SetTimesteps:
        return flux_timesteps


class FluxKontext(Flux):
    """FLUX.1-Kontext, as ``FluxKontextPipeline`` runs it: editing of a reference picture, and text-to-image without one.

    The reference's tokens stand behind the target's. Without a reference `has_reference` is 0 and masks them, so that any
    reference serves; the smallest, 2 x 2 cells, is one token.
    """

    name = "flux-kontext"
    pipelines = ("FluxKontextPipeline",)
    tasks = ("text-to-image", "image-editing")
    stream = KontextStream()

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        return (
            *super().conditions(config),
            Condition("reference", (self.latent_channels(config), "RH", "RW"), "reference_latents", embedded=True),
            Condition("has_reference", (), "has_reference"),
        )

    def reference_sizes(self, config: Any) -> tuple[tuple[int, int], ...]:
        """Those the model was trained on; the pipeline lists them as (width, height)."""
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        return tuple((height, width) for width, height in PREFERRED_KONTEXT_RESOLUTIONS)

    def condition_axes(self, config: Any, max_tokens: int) -> tuple[Axis, ...]:
        largest = PATCH * max(max_tokens, LARGEST_REFERENCE)
        return (Axis("RH", PATCH, largest, 4 * PATCH, PATCH), Axis("RW", PATCH, largest, 7 * PATCH, PATCH))

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every second sample is without a reference."""
        flags = (torch.arange(len(drawn["has_reference"])) % 2 == 0).float()
        return {**super().condition_examples(config, drawn), "has_reference": flags}


def packed(latents: Tensor) -> Tensor:
    """Latents `[N, C, H, W]` as tokens `[N, H/2 * W/2, C * 4]`: row by row, a cell's four numbers side by side."""
    cells = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def positions_of(latents: Tensor, picture: int) -> Tensor:
    """Positions `[H/2 * W/2, 3]` of the tokens of latents `[N, C, H, W]`: (picture, row, column)."""
    height, width = _grid(latents)
    rows = torch.arange(height, device=latents.device, dtype=torch.float32)[:, None].expand(-1, width)
    columns = torch.arange(width, device=latents.device, dtype=torch.float32)[None].expand(height, -1)
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1).flatten(0, 1)


def _grid(latents: Tensor) -> tuple[int, int]:
    return latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
