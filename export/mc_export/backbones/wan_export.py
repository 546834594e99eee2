"""Wan as engines run it: the same numbers, without what no step changes and without a timestep for every token.

The context enters a step through every block's cross-attention alone, as keys and values; `WanContext` computes them all once.
Frames carry either the step's timestep or 0, so timesteps are embedded once a sample, the embedding of 0 is a constant, and
each frame takes one of the two. diffusers embeds and projects the timestep of every token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanRotaryPosEmbed,
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn

from mc_export.backbones.fused import FusedLinear
from mc_export.backbones.rotary import rotated_heads

MASK_BIAS = -10000.0


def bias_of(weights: Tensor) -> Tensor:
    """What makes a row count `weights` times: added to its scores. `[N, L]`, 0 or more each, to `[N, 1, 1, L]`.

    `exp(score + log(n)) = n exp(score)`, so one row with its count stands for n equal rows, exactly.
    """
    counts = weights.to(torch.float32)
    return torch.where(counts > 0, counts.clamp_min(1).log(), MASK_BIAS)[:, None, None, :]


class RowWeights:
    """The bias of the pass under way; a plain object, so that tracing sees no assignment to a module."""

    bias: Tensor | None = None


class WeightedAttention(WanAttnProcessor):
    """The published processor, its scores biased by `weights`: the model's forward has no way to pass a mask."""

    def __init__(self, weights: RowWeights) -> None:
        super().__init__()
        self.weights = weights

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        bias = self.weights.bias
        mask = None if bias is None else bias.to(hidden_states.dtype)
        attended: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)
        return attended


class WanContext(nn.Module):
    """Context `[B, L, D_context]` to all blocks' keys and values `[B, L, blocks * 2 * D]`: block by block, keys before values.

    Args:
        model: a `WanTransformer3DModel`; its own layers are used, not copied, but for the projections, fused into one product.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        attentions = [block.attn2 for block in model.blocks]
        layers = {
            f"transformer.blocks.{index}.attn2.{name}": getattr(attn, name)
            for index, attn in enumerate(attentions)
            for name in ("to_k", "to_v")
        }
        self.width = attentions[0].to_k.out_features
        self.text_embedder = model.condition_embedder.text_embedder
        self.key_norms = nn.ModuleList(attn.norm_k for attn in attentions)
        self.keys_and_values = FusedLinear(layers)
        self.requires_grad_(False).eval()

    def forward(self, context: Tensor) -> Tensor:
        states = self.keys_and_values(self.text_embedder(context))
        keys, values = states.unflatten(-1, (-1, 2, self.width)).unbind(-2)
        keys = torch.stack([norm(keys[..., block, :]) for block, norm in enumerate(self.key_norms)], dim=-2)
        return torch.stack([keys, values], dim=-2).flatten(-3)


class PreparedWan(WanTransformer3DModel):
    """A `WanTransformer3DModel` after `prepare`: its forward takes what no step changes ready made."""

    def forward(  # type: ignore[override]  # the published one has no masks, and timesteps for tokens
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        context_weights: Tensor,
        clean_frames: Tensor,
        frame_weights: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """One prediction `[N, C_out, F, H, W]`.

        Args:
            hidden_states: `[N, C_in, F, H, W]`.
            timestep: `[N]`, the step's.
            encoder_hidden_states: `WanContext`'s result, `[N, L, blocks * 2 * D]`.
            context_weights: `[N, L]`, how often a row counts.
            clean_frames: `[N, F]`, 1 where a frame is at timestep 0.
            frame_weights: `[N, F]`, 0 where a frame is an empty slot that no other may see; None where all count.
            return_dict: not used; results are a tuple.
        """
        tokens = self.patch_embedding(hidden_states)
        frames, height, width = tokens.shape[2:]
        tokens = tokens.flatten(3).permute(0, 2, 3, 1)  # [N, F, cells, D]
        angles = self.rope(frames, height, width)
        embedding, modulation = embedded_timestep(self, self.condition_embedder.timesteps_proj(timestep))
        clean = clean_frames[..., None] > 0
        embedding = torch.where(clean, self.get_buffer("clean_embedding"), embedding[:, None])
        modulation = torch.where(clean, self.get_buffer("clean_modulation"), modulation[:, None]).unflatten(-1, (6, -1))
        context_bias = bias_of(context_weights)
        frame_bias = None
        if frame_weights is not None:
            frame_bias = bias_of(frame_weights[..., None].expand(-1, -1, tokens.shape[2]).flatten(1))
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states, context_bias, modulation, angles, frame_bias)
        shift, scale = (self.scale_shift_table + embedding[:, :, None]).chunk(2, dim=2)
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        _, patch_h, patch_w = self.config.patch_size
        cells = tokens.unflatten(-1, (patch_h, patch_w, -1)).unflatten(2, (height, width))  # [N, F, h, w, p, p, C]
        return (cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4),)


def embedded_timestep(model: nn.Module, sinusoids: Tensor) -> tuple[Tensor, Tensor]:
    """Sinusoids `[N, channels]` to the timestep's embedding `[N, D]` and the blocks' modulation `[N, 6 * D]`."""
    embedder = model.condition_embedder
    embedding = embedder.time_embedder(sinusoids.to(embedder.time_proj.weight.dtype))
    return embedding, embedder.time_proj(embedder.act_fn(embedding))


def prepare(model: nn.Module) -> None:
    """Turns a `WanTransformer3DModel`, in place, into a `PreparedWan`."""
    with torch.no_grad():
        embedding, modulation = embedded_timestep(model, model.condition_embedder.timesteps_proj(torch.zeros(1)))
    model.register_buffer("clean_embedding", embedding, persistent=False)
    model.register_buffer("clean_modulation", modulation, persistent=False)
    model.condition_embedder.text_embedder = nn.Identity()
    model.rope = Angles(model.rope)
    model.blocks = nn.ModuleList(PreparedBlock(block, index, len(model.blocks)) for index, block in enumerate(model.blocks))
    model.__class__ = PreparedWan


class Angles(nn.Module):
    """Cosines and sines of the rotary embedding, `[F * h * w, head / 2]`: the published tables hold each entry twice."""

    def __init__(self, rope: WanRotaryPosEmbed) -> None:
        super().__init__()
        widths = [rope.t_dim, rope.h_dim, rope.w_dim]
        for name, published in (("cos", rope.freqs_cos), ("sin", rope.freqs_sin)):
            for axis, table in zip("thw", published.split(widths, dim=1), strict=True):
                self.register_buffer(f"{name}_{axis}", table[:, ::2].float().contiguous(), persistent=False)

    def forward(self, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        return self._grid("cos", frames, height, width), self._grid("sin", frames, height, width)

    def _grid(self, name: str, frames: int, height: int, width: int) -> Tensor:
        t, h, w = (self.get_buffer(f"{name}_{axis}") for axis in "thw")
        axes = (t[:frames][:, None, None], h[:height][None, :, None], w[:width][None, None])
        return torch.cat([table.expand(frames, height, width, -1) for table in axes], dim=-1).flatten(0, 2)


class PreparedBlock(nn.Module):
    """A `WanTransformerBlock` that modulates by frames and reads its keys and values of the context from the prepared one."""

    def __init__(self, block: WanTransformerBlock, index: int, blocks: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1, self.ffn = block.attn1, block.ffn
        self.attn2 = PreparedCrossAttention(block.attn2, index, blocks)
        self.scale_shift_table = block.scale_shift_table

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_bias: Tensor,
        modulation: Tensor,
        angles: tuple[Tensor, Tensor],
        frame_bias: Tensor | None,
    ) -> Tensor:
        """Tokens `[N, F, cells, D]`, modulation `[N, F, 6, D]`; biases broadcast to `[N, heads, queries, keys]`."""
        chunks = (self.scale_shift_table + modulation).chunk(6, dim=2)  # each [N, F, 1, D]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = chunks
        normed = self.norm1(tokens) * (1 + scale) + shift
        tokens = tokens + gate * self._self_attention(normed, angles, frame_bias)
        tokens = tokens + self.attn2(self.norm2(tokens), context, context_bias)
        normed = self.norm3(tokens) * (1 + scale_ff) + shift_ff
        return tokens + gate_ff * self.ffn(normed)

    def _self_attention(self, states: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        attn = self.attn1
        joined = states.flatten(1, 2)
        query, key = (
            rotated_heads(norm(projection(joined)).unflatten(-1, (attn.heads, -1)), *angles)
            for projection, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        value = attn.to_v(joined).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        output: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return output.unflatten(1, states.shape[1:3])


class PreparedCrossAttention(nn.Module):
    """A block's cross-attention, reading its keys and values from the prepared context."""

    def __init__(self, attn: WanAttention, index: int, blocks: int) -> None:
        super().__init__()
        self.to_q, self.norm_q, self.to_out, self.heads = attn.to_q, attn.norm_q, attn.to_out, attn.heads
        self.index, self.count = index, blocks

    def forward(self, states: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        """States `[N, F, cells, D]` to the same shape; `bias` broadcasts to `[N, heads, queries, rows]`."""
        query = self.norm_q(self.to_q(states.flatten(1, 2))).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        prepared = context.unflatten(-1, (self.count, 2, self.heads, -1))[:, :, self.index]
        key, value = (rows.transpose(1, 2) for rows in prepared.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        output: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return output.unflatten(1, states.shape[1:3])


def row_weights(model: Any) -> tuple[RowWeights, RowWeights]:
    """What an adopted model's self-attention and cross-attention read their biases from."""
    block = model.blocks[0]
    return block.attn1.processor.weights, block.attn2.processor.weights


def weigh_rows(model: nn.Module) -> None:
    """Gives every attention of a published model the processor that weighs its keys, in place."""
    own, cross = RowWeights(), RowWeights()
    for block in model.blocks:
        block.attn1.set_processor(WeightedAttention(own))
        block.attn2.set_processor(WeightedAttention(cross))
