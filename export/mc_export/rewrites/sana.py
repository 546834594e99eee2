"""SANA's blocks, the backbone's own and the canvas connector's, by the operators of `mc_kernels`.

    q, k, v = u W^T                              one product for the three projections
    y       = linear_attention(q, k, v) W_o      ReLU linear attention
    h, u    = gated_residual_norm(h, y, ...)     the residual that ends one half, the norm and modulation that open the next
    y       = glumb_depthwise(u W_1^T) W_2^T     the Mix-FFN, channels last throughout

In the connector, where the canvas enters, the first line's u comes from `canvas_injection_attention`: the interpolated canvas
never exists in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mc_export.backbones.sana_block import ExportableBlock, MixFeedForward, modulation_of
from mc_export.model.canvas_connector import CanvasConnector, CanvasStepBlock
from mc_export.quantize.fp8.layers import Fp8Linear
from mc_export.rewrites.counts import Counts, check_blocks
from mc_export.rewrites.parts import as_linear, merged_linear
from mc_kernels.canvas_inject import canvas_inject_fp8
from mc_kernels.canvas_injection_attention import canvas_injection_attention
from mc_kernels.gated_residual_norm import gated_residual_norm
from mc_kernels.glumb_depthwise import glumb_depthwise, taps_from_conv
from mc_kernels.linear_attention import HEAD_WIDTH, linear_attention
from mc_runtime.errors import EngineError


def use_sana_kernels(model: Any) -> Counts:
    """Rewrites the blocks of a prepared `SanaTransformer2DModel` in place.

    Raises:
        EngineError: a block was not matched, or is of a kind that no kernel is written for.
    """
    blocks = model.transformer_blocks
    check_blocks(blocks, ExportableBlock, int(model.config.num_layers))
    model.transformer_blocks = nn.ModuleList(KernelBlock(block) for block in blocks)
    return {name: len(blocks) for name in ("linear_attention", "gated_residual_norm", "glumb_depthwise")}


def kernel_connector(connector: CanvasConnector) -> tuple[KernelConnector, Counts]:
    """What stands for a connector, of whatever backbone, in the step.

    Raises:
        EngineError: its block was not matched.
    """
    step = connector.step_block
    check_blocks([step.block], ExportableBlock, 1)
    made = KernelConnector(step)
    entry = ("canvas_inject_fp8", "linear_attention") if made.in_fp8 else ("canvas_injection_attention",)
    return made, dict.fromkeys((*entry, "gated_residual_norm", "glumb_depthwise"), 1)


class SelfAttention(nn.Module):
    """The projections of a SANA block's self-attention, merged.

    Raises:
        EngineError: heads of another width than the kernel's, or norms of queries and keys, which it does not have.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        layers = [attention.to_q, attention.to_k, attention.to_v]
        width = layers[0].out_features
        if width != HEAD_WIDTH * attention.heads or attention.norm_q is not None or attention.norm_k is not None:
            raise EngineError(
                f"linear attention of {attention.heads} heads in {width} channels, or with normed queries: the kernels have "
                f"heads of {HEAD_WIDTH} and no norms; build it for another target"
            )
        self.projections = merged_linear(layers)
        self.out = attention.to_out[0]

    def forward(self, normed: Tensor) -> Tensor:
        projected = self.projections(normed).unflatten(-1, (3, -1, HEAD_WIDTH))
        query, key, value = projected.unbind(2)
        attended: Tensor = self.out(linear_attention(query, key, value).flatten(2))
        return attended


class FeedForward(nn.Module):
    """The Mix-FFN on tokens, value and gate in one product again; its depthwise taps stay in float32."""

    taps: Tensor

    def __init__(self, ff: MixFeedForward) -> None:
        super().__init__()
        halves = (ff.value, ff.gate)
        self.inverted = merged_linear([as_linear(half[0]) for half in halves])
        depthwise = torch.cat([half[2].weight for half in halves])
        # Not among the saved buffers: those are what a precision below float32 is applied to.
        self.register_buffer("taps", taps_from_conv(depthwise), persistent=False)
        self.depth_bias = nn.Parameter(torch.cat([half[2].bias for half in halves]), requires_grad=False)
        self.point = as_linear(ff.conv_point)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        expanded = self.inverted(tokens).unflatten(1, (height, width))
        mixed = glumb_depthwise(expanded, self.taps, self.depth_bias).flatten(1, 2)
        result: Tensor = self.point(mixed)
        return result


class KernelBlock(nn.Module):
    """An `ExportableBlock` by kernels, with the same arguments."""

    def __init__(self, block: ExportableBlock) -> None:
        super().__init__()
        self.norm1, self.eps = block.norm1, block.norm2.eps
        self.attn1, self.attn2 = SelfAttention(block.attn1), block.attn2
        self.scale_shift_table = block.scale_shift_table
        self.ff = FeedForward(block.ff)

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
        assert timestep is not None
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation_of(self.scale_shift_table, timestep)
        attended = self.attn1(self.norm1(hidden_states) * (1 + scale_attn) + shift_attn)
        gate: Tensor | None = gate_attn
        if self.attn2 is not None:
            hidden_states = hidden_states + gate_attn * attended
            attended, gate = self.attn2(
                hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            ), None  # fmt: skip
        hidden_states, normed = gated_residual_norm(hidden_states, attended, gate, shift_ff, scale_ff, self.eps)
        return hidden_states + gate_ff * self.ff(normed, height, width)


class KernelConnector(nn.Module):
    """The per-step half of a `CanvasConnector` by kernels."""

    def __init__(self, step: CanvasStepBlock) -> None:
        super().__init__()
        block = step.block
        del step.block  # what it still gives is the modulation and the last projection
        self.step, self.scale_shift_table = step, block.scale_shift_table
        self.attn1, self.ff = SelfAttention(block.attn1), FeedForward(block.ff)
        self.eps = (block.norm1.eps, block.norm2.eps)
        self.in_fp8 = isinstance(self.attn1.projections, Fp8Linear)

    def residual(self, tokens: Tensor, canvas: Tensor, timestep: Tensor, clean: Tensor | None = None) -> Tensor:
        """See `CanvasConnector.residual`."""
        b, t, h, w, d = tokens.shape
        embedded = self.step.modulation(timestep, t, clean, tokens.dtype).flatten(0, 1)
        modulation = modulation_of(self.scale_shift_table, embedded)
        shift, scale = (rows.unflatten(0, (b, t)).squeeze(2) for rows in modulation[:2])
        gate_attn, shift_ff, scale_ff, gate_ff = modulation[2:]
        tokens, canvas = tokens.contiguous(), canvas.to(tokens.dtype).contiguous()
        if self.in_fp8:  # the canvas enters with its rows' codes
            hidden, codes, row_scale = canvas_inject_fp8(tokens, canvas, shift, scale, self.eps[0])
            projected = self.attn1.projections.of_codes(codes, row_scale, tokens.dtype)
            query, key, value = projected.reshape(b * t, h * w, 3, -1, HEAD_WIDTH).unbind(2)
            attended = linear_attention(query, key, value)
        else:
            weight, bias = self.attn1.projections.weight, self.attn1.projections.bias
            hidden, attended = canvas_injection_attention(tokens, canvas, shift, scale, weight, bias, self.eps[0])
        folded = (b * t, h * w, d)
        output = self.attn1.out(attended.reshape(folded))
        hidden, normed = gated_residual_norm(hidden.reshape(folded), output, gate_attn, shift_ff, scale_ff, self.eps[1])
        result: Tensor = self.step.proj_out(hidden + gate_ff * self.ff(normed, h, w))
        return result.reshape(tokens.shape)
