"""Wan's blocks by the operators of `mc_kernels`, as one stack.

    q, k, v = u W^T                              one product for the three projections of self-attention
    q, k    = qk_norm_rope(q, k, ...)            RMS norm over all heads together, rotary positions
    h, u    = gated_residual_norm(h, y, ...)     three a block: before self-attention (not the first block's), before cross-
                                                 attention (with that norm's own weights), before the feed-forward network

Tokens carry their frame's timestep (the step's, or 0), so frames are the batch of `gated_residual_norm`: its modulation is
read once a frame and not once a token. No module that is handed the angles has parameters of its own, so that a precision
below float32 leaves them alone.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.wan_export import PreparedBlock
from mc_export.rewrites.counts import Counts, check_blocks
from mc_export.rewrites.parts import Stream, merged_linear
from mc_kernels.qk_norm_rope import qk_norm_rope
from mc_runtime.errors import EngineError

Angles = tuple[Tensor, Tensor]


def use_wan_kernels(model: Any) -> Counts:
    """Rewrites the blocks of a `PreparedWan` in place.

    Raises:
        EngineError: a block was not matched, or has no norm before its cross-attention.
    """
    blocks = model.blocks
    check_blocks(blocks, PreparedBlock, int(model.config.num_layers))
    model.blocks = nn.ModuleList([KernelStack(blocks)])
    return {"gated_residual_norm": 3 * len(blocks) - 1, "qk_norm_rope": len(blocks)}


class KernelStack(nn.Module):
    """All blocks, called as one `PreparedBlock`."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KernelBlock(block) for block in blocks)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_bias: Tensor,
        modulation: Tensor,
        angles: Angles,
        frame_bias: Tensor | None,
    ) -> Tensor:
        """See `PreparedBlock.forward`."""
        frames = tokens.shape[1]
        stream, rows = Stream(tokens.flatten(0, 1).contiguous()), modulation.flatten(0, 1)
        for block in self.blocks:
            stream = block(stream, frames, context, context_bias, rows, angles, frame_bias)
        return stream.settled().unflatten(0, (-1, frames))


class KernelBlock(nn.Module):
    """A `PreparedBlock` on frames: its tokens are `[N * F, cells, D]`.

    Raises:
        EngineError: the block has no norm before its cross-attention.
    """

    cross_shift: Tensor
    cross_scale: Tensor

    def __init__(self, block: PreparedBlock) -> None:
        super().__init__()
        if isinstance(block.norm2, nn.Identity):
            raise EngineError("no kernel is written for Wan without a norm before cross-attention; build it for another target")
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        # In float32, and not among the saved buffers: bfloat16 would round the scale once more as a difference from one.
        weight, bias = block.norm2.weight.detach().float(), block.norm2.bias.detach().float()
        self.register_buffer("cross_scale", (weight - 1)[None, None], persistent=False)
        self.register_buffer("cross_shift", bias[None, None].clone(), persistent=False)
        self.table = Table(block.scale_shift_table)
        attn = block.attn1
        self.heads, self.norm_q, self.norm_k, self.out = attn.heads, attn.norm_q, attn.norm_k, attn.to_out[0]
        self.projections = merged_linear([attn.to_q, attn.to_k, attn.to_v])
        self.cross_attention, self.ffn = block.attn2, block.ffn

    def forward(
        self,
        stream: Stream,
        frames: int,
        context: Tensor,
        context_bias: Tensor,
        modulation: Tensor,
        angles: Angles,
        frame_bias: Tensor | None,
    ) -> Stream:
        """Modulation `[N * F, 6, D]`, angles `[F * cells, d / 2]`; the rest as `PreparedBlock.forward` has it."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.table(modulation)
        h, u = stream.opened(self.norm1, shift, scale)
        stream = Stream(h, self._self_attention(u, frames, angles, frame_bias), gate)
        own_shift, own_scale = (row.expand(h.shape[0], 1, -1) for row in (self.cross_shift, self.cross_scale))
        h, u = stream.opened(self.norm2, own_shift, own_scale)
        attended = self.cross_attention(u.unflatten(0, (-1, frames)), context, context_bias).flatten(0, 1)
        h, u = Stream(h, attended).opened(self.norm3, shift_ff, scale_ff)
        return Stream(h, self.ffn(u), gate_ff)

    def _self_attention(self, u: Tensor, frames: int, angles: Angles, bias: Tensor | None) -> Tensor:
        """Over all frames of a clip."""
        joined = u.unflatten(0, (-1, frames)).flatten(1, 2)
        query, key, value = self.projections(joined).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = qk_norm_rope(query, key, self.norm_q.weight, self.norm_k.weight, *angles, self.norm_q.eps)
        heads = (states.transpose(1, 2) for states in (query, key, value))
        attended = F.scaled_dot_product_attention(*heads, attn_mask=bias).transpose(1, 2).flatten(2)
        output: Tensor = self.out(attended)
        return output.unflatten(1, (frames, -1)).flatten(0, 1)


class Table(nn.Module):
    """A block's part of the modulation."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.scale_shift_table = table

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """The timestep's `[N * F, 6, D]` to shift, scale and gate `[N * F, 1, D]` of the attention, then of the rest."""
        return (self.scale_shift_table + modulation).chunk(6, dim=1)
