"""SANA as engines run it: the same numbers, without what does not survive export and without what no step changes.

The context enters a step through every block's cross-attention alone, as keys and values. They depend on the request only, so
`SanaContext` computes them all once, and the blocks' processors read theirs from its result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mc_export.backbones.fused import FusedLinear
from mc_runtime.errors import CheckpointError


class SanaContext(nn.Module):
    """Context `[B, L, D_context]` to all blocks' keys and values `[B, L, blocks * 2 * D]`: block by block, keys before values.

    Args:
        model: a `SanaTransformer2DModel`; its own layers are used, not copied, but for the projections, fused into one product.

    Raises:
        CheckpointError: a block's cross-attention is not as wide as the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        attentions = [block.attn2 for block in model.transformer_blocks]
        self.width = int(model.config.num_attention_heads * model.config.attention_head_dim)
        self.projection = model.caption_projection
        self.norm = model.caption_norm
        self.key_norms = nn.ModuleList(attn.norm_k for attn in attentions if attn.norm_k is not None)
        layers = {
            f"transformer.transformer_blocks.{index}.attn2.{name}": getattr(attn, name)
            for index, attn in enumerate(attentions)
            for name in ("to_k", "to_v")
        }
        for layer in layers.values():
            if layer.out_features != self.width:
                raise CheckpointError(
                    f"the cross-attention is {layer.out_features} wide and the model {self.width}; they must be equal"
                )
        self.keys_and_values = FusedLinear(layers)
        self.requires_grad_(False).eval()

    def forward(self, context: Tensor) -> Tensor:
        states = self.keys_and_values(self.norm(self.projection(context)))
        if len(self.key_norms) == 0:
            return states
        keys, values = states.unflatten(-1, (-1, 2, self.width)).unbind(-2)
        keys = torch.stack([norm(keys[..., block, :]) for block, norm in enumerate(self.key_norms)], dim=-2)
        return torch.stack([keys, values], dim=-2).flatten(-3)


def use_prepared_context(model: nn.Module) -> None:
    """Makes `model`, in place, take `SanaContext`'s result as its context."""
    model.caption_projection = nn.Identity()
    model.caption_norm = nn.Identity()
    blocks = len(model.transformer_blocks)
    for index, block in enumerate(model.transformer_blocks):
        block.attn2.set_processor(PreparedCrossAttention(index, blocks))
        block.attn2.to_k, block.attn2.to_v, block.attn2.norm_k = None, None, None


def use_exportable_self_attention(module: nn.Module) -> None:
    """Gives every self-attention below `module` (of SANA's kind: linear) the processor that survives export, in place."""
    for attn in module.modules():
        if isinstance(attn, Attention) and not attn.is_cross_attention:
            attn.set_processor(LinearAttention())


class LinearAttention:
    """`SanaLinearAttnProcessor2_0` in token-major layout, with a denominator that survives the ONNX optimiser.

    The published `x / (d + 1e-15)` loses its constant there (additions of less than 1e-8 are dropped) and 0 / 0 is NaN.
    `d` is a sum of non-negative terms, so clamping it from below gives the same bits. The denominator is a product with the
    keys' sums instead of a row of ones padded onto the values: no copy of the values, and heads stay 32 wide.
    """

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for states in (F.relu(query), F.relu(key), value)
        )
        scores = key.transpose(2, 3) @ value  # [B, heads, d, d]
        normaliser = query @ key.sum(dim=2, keepdim=True).transpose(2, 3)  # [B, heads, N, 1]
        attended = (query @ scores) / normaliser.clamp_min(1e-15)
        attended = attended.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        output: Tensor = attn.to_out[0](attended)
        return output


class PreparedCrossAttention:
    """`SanaAttnProcessor2_0` for one block, reading its keys and values from the prepared context.

    The model's forward has folded the context to `[B, L * blocks * 2, D]`; the mask stays `[B, 1, 1, L]`, for which the
    published view over heads has no dynamic form.
    """

    def __init__(self, index: int, blocks: int) -> None:
        self.index = index
        self.blocks = blocks

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        query = query.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        prepared = encoder_hidden_states.view(query.shape[0], -1, self.blocks, 2, attn.heads, query.shape[-1])
        key, value = (states.transpose(1, 2) for states in prepared[:, :, self.index].unbind(2))
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[0](attended.to(query.dtype)) / attn.rescale_output_factor
        return output
