"""SANA: a DiT with linear attention and cross-attention to the context (diffusers ``SanaTransformer2DModel``)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mc_export.backbones.base import Backbone

MASK_BIAS = -10000.0  # what diffusers' Sana adds to the scores of rows that do not count


class Sana(Backbone):
    """SANA (arXiv 2410.10629), as ``SanaPipeline`` runs it."""

    name = "sana"
    model_classes = ("SanaTransformer2DModel",)
    component = "transformer"
    patch_embedding = "patch_embed"
    tasks = ("text-to-image",)
    default_guidance = 4.5
    default_steps = 20

    def width(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    def context_width(self, config: Any) -> int:
        return int(config.caption_channels)

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels)

    def patch(self, config: Any) -> tuple[int, int, int]:
        return (1, config.patch_size, config.patch_size)

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        return (config.sample_size, config.sample_size)

    def timestep_scale(self, config: Any) -> float:
        return float(config.timestep_scale)

    def tokens_to_grid(self, tokens: Tensor, patch_input: Tensor, config: Any) -> Tensor:
        height, width = (extent // config.patch_size for extent in patch_input.shape[-2:])
        return tokens.unflatten(1, (1, height, width))

    def grid_to_tokens(self, grid: Tensor) -> Tensor:
        return grid.flatten(1, 3)

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Any
    ) -> dict[str, Any]:
        # Given as a bias [B, 1, L], the mask takes the same way through the model as a 0/1 mask does.
        return {
            "hidden_states": sample,
            "timestep": timestep,
            "encoder_hidden_states": context,
            "encoder_attention_mask": ((1 - context_mask.to(sample.dtype)) * MASK_BIAS)[:, None],
            **conditions,
        }

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        return output[:, : sample.shape[1]]

    def prepare_for_export(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                module.set_processor(CrossAttention() if module.is_cross_attention else LinearAttention())


class LinearAttention:
    """``SanaLinearAttnProcessor2_0``, with a denominator that survives the ONNX optimiser.

    The published ``x / (d + 1e-15)`` loses its constant there (additions of less than 1e-8 are dropped) and 0 / 0 is NaN.
    ``d`` is a sum of non-negative terms, so clamping it from below gives the same bits.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, **_: Any) -> Tensor:
        query, key = _projected_query_and_key(attn, hidden_states, hidden_states)
        query, key, value = (
            states.transpose(1, 2).unflatten(1, (attn.heads, -1)) for states in (query, key, attn.to_v(hidden_states))
        )
        query, key, value = F.relu(query).float(), F.relu(key).transpose(2, 3).float(), value.float()
        scores = F.pad(value, (0, 0, 0, 1), value=1.0) @ key
        attended = scores @ query
        attended = attended[:, :, :-1] / attended[:, :, -1:].clamp_min(1e-15)
        attended = attended.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        output: Tensor = attn.to_out[0](attended)
        return output


class CrossAttention:
    """``SanaAttnProcessor2_0`` with the mask kept as ``[B, 1, 1, L]``: its view over heads has no dynamic form."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query, key = _projected_query_and_key(attn, hidden_states, encoder_hidden_states)
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for states in (query, key, attn.to_v(encoder_hidden_states))
        )
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[0](attended.to(query.dtype)) / attn.rescale_output_factor
        return output


def _projected_query_and_key(attn: Attention, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[B, N, inner]`` and keys ``[B, L, inner]``, normalised where the checkpoint does so (SANA 1.5 and later)."""
    query, key = attn.to_q(hidden_states), attn.to_k(context)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key
