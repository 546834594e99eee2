"""SANA's transformer block in the form that inference libraries run fastest: the same numbers, fewer copies.

Two things differ from diffusers' `SanaTransformerBlock`, both found by profiling (docs/log.md):

- The Mix-FFN's result goes back to tokens by `permute, flatten`. The published `flatten, permute` forces a channels-last
  convolution's result into channels-first memory and out of it again.
- Value and gate of the Mix-FFN have convolutions of their own. Cut from one result by `chunk`, both are copied, and the gate's
  SiLU and the product cannot be computed where the depthwise convolutions end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformerBlock
from torch import Tensor, nn


class ExportableBlock(nn.Module):
    """A `SanaTransformerBlock`, with or without cross-attention. It shares the block's parameters but for the Mix-FFN's.

    Args:
        block: the published block, its attention processors set.
    """

    def __init__(self, block: SanaTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn1, self.attn2 = block.attn1, block.attn2
        self.scale_shift_table = block.scale_shift_table
        self.ff = MixFeedForward(block.ff)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int = 0,
        width: int = 0,
    ) -> Tensor:
        """As the published block: tokens `[B, height * width, D]`, modulation `[B, 6 * D]`; `attention_mask` is not used."""
        assert timestep is not None
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation_of(self.scale_shift_table, timestep)
        normed = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn
        hidden_states = hidden_states + gate_attn * self.attn1(normed)
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(
                hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        normed = self.norm2(hidden_states) * (1 + scale_ff) + shift_ff
        picture = normed.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return hidden_states + gate_ff * self.ff(picture).permute(0, 2, 3, 1).flatten(1, 2)


def modulation_of(table: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
    """AdaLN-single: a block's table `[6, D]` and the timestep's `[N, 6 * D]` to shift, scale and gate `[N, 1, D]` of the
    attention, then of the feed-forward network."""
    return (table[None] + timestep.unflatten(1, (6, -1))).chunk(6, dim=1)


class MixFeedForward(nn.Module):
    """`GLUMBConv` without its residual connection, `[B, D, H, W]` to the same shape; value and gate apart."""

    def __init__(self, ff: GLUMBConv) -> None:
        super().__init__()
        if ff.residual_connection or ff.norm is not None:
            raise ValueError("a Mix-FFN with a residual connection or a norm is none of SANA's transformer")
        self.value, self.gate = (_half(ff, index) for index in (0, 1))
        self.conv_point = ff.conv_point

    def forward(self, hidden_states: Tensor) -> Tensor:
        mixed: Tensor = self.conv_point(self.value(hidden_states) * F.silu(self.gate(hidden_states)))
        return mixed


def _half(ff: GLUMBConv, index: int) -> nn.Sequential:
    """One half of the channels: 1 x 1 convolution, SiLU, depthwise convolution."""
    hidden = ff.conv_point.in_channels
    rows = slice(index * hidden, (index + 1) * hidden)
    inverted = nn.Conv2d(ff.conv_inverted.in_channels, hidden, 1)
    depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
    with torch.no_grad():
        for layer, source in ((inverted, ff.conv_inverted), (depth, ff.conv_depth)):
            layer.to(source.weight.dtype)
            layer.weight.copy_(source.weight[rows])
            layer.bias.copy_(source.bias[rows])
    return nn.Sequential(inverted, nn.SiLU(), depth).requires_grad_(False)


def use_exportable_blocks(module: nn.Module) -> int:
    """Puts an `ExportableBlock` in the place of every SANA block below `module`; returns how many there were."""
    found = [(name, block) for name, block in module.named_modules() if isinstance(block, SanaTransformerBlock)]
    for name, block in found:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, ExportableBlock(block))
    return len(found)
