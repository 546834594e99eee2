"""Cross-attention of diffusers' UNets: with a mask over the context, and with keys and values computed before the first step.

The context enters a UNet through its blocks' `attn2` alone, as keys and values that depend on the request only. A video model
repeats it for every frame, or for every cell; here the queries of one sample are folded into one sequence instead.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from mc_export.backbones.fused import FusedLinear
from mc_runtime.errors import CheckpointError

MASK_BIAS = -10000.0  # what diffusers' UNets add to the scores of rows that do not count


class ContextSource:
    """What the cross-attentions of one model read in the pass under way.

    A plain object, so that tracing sees no assignment to a module.

    Attributes:
        states: keys and values of all cross-attentions, `[N, L, width]`; None while the model takes the context itself.
        bias: added to the scores, `[N, 1, L]`; None where every row counts.
        samples: N, as the noisy sample has it: the exporter takes long to see that it is the context's, too.
    """

    states: Tensor | None = None
    bias: Tensor | None = None
    samples: int = 1


def cross_attentions(model: nn.Module) -> list[Attention]:
    """The attentions to the context, in the order of the modules."""
    return [module for module in model.modules() if isinstance(module, Attention) and module.is_cross_attention]


def prepared_width(model: nn.Module) -> int:
    """Keys and values of all cross-attentions side by side."""
    return sum(2 * attention.inner_dim for attention in cross_attentions(model))


def take_masks(model: nn.Module) -> None:
    """Lets the published model, in place, mask rows of its context; without a mask it computes the same bits as before.

    Changes nothing where it was done before, or where keys and values are prepared.
    """
    attentions = cross_attentions(model)
    if all(isinstance(attention.processor, AttnProcessor2_0) for attention in attentions):
        source = ContextSource()
        for attention in attentions:
            attention.set_processor(MaskedCrossAttention(source))


def take_prepared_context(model: nn.Module) -> None:
    """Lets the model, in place, read its keys and values from :class:`UNetContext`'s result."""
    source, start = ContextSource(), 0
    for attention in cross_attentions(model):
        attention.set_processor(PreparedCrossAttention(source, start, attention.inner_dim))
        attention.to_k, attention.to_v = None, None
        start += 2 * attention.inner_dim


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`take_prepared_context` was applied to it."""
    return isinstance(cross_attentions(model)[0].processor, PreparedCrossAttention)


def tell_context(model: nn.Module, samples: int, context: Tensor, context_mask: Tensor) -> Tensor:
    """Tells the cross-attentions what the next pass of the model is conditioned on.

    Args:
        model: after :func:`take_masks` or :func:`take_prepared_context`.
        samples: N.
        context: `[N, L, D]`, prepared if the model takes it so.
        context_mask: `[N, L]`, 1 where a row counts.

    Returns:
        What the model's forward is given as its context: `context` itself, or, where nothing reads it, `[N, 1, 1]`.
    """
    processor = cross_attentions(model)[0].processor
    source = processor.source
    bias = (context_mask == 0).to(context.dtype) * MASK_BIAS
    if isinstance(processor, PreparedCrossAttention):
        source.states, source.bias, source.samples = context, bias[:, None], samples
        return context[:, :1, :1]
    source.bias = None if bool(context_mask.all()) else bias[:, None]
    return context


class UNetContext(nn.Module):
    """Context `[B, L, D_context]` to the keys and values of all cross-attentions, side by side: `[B, L, width]`.

    Args:
        model: as published; its projections are copied into one.

    Raises:
        CheckpointError: its cross-attentions are not of the plain kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        attentions = cross_attentions(model)
        for attention in attentions:
            if attention.norm_cross or attention.norm_k is not None or attention.to_k.bias is not None:
                raise CheckpointError("unet: cross-attention with biases or norms of keys is not supported")
        names = {id(module): name for name, module in model.named_modules()}
        self.keys_and_values = FusedLinear(
            {
                f"unet.{names[id(attention)]}.{name}": getattr(attention, name)
                for attention in attentions
                for name in ("to_k", "to_v")
            }
        )
        self.requires_grad_(False).eval()

    def forward(self, context: Tensor) -> Tensor:
        states: Tensor = self.keys_and_values(context)
        return states


class MaskedCrossAttention(AttnProcessor2_0):
    """The published processor, which the published forward does not always give a mask."""

    def __init__(self, source: ContextSource) -> None:
        super().__init__()
        self.source = source

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        bias = self.source.bias
        if bias is not None and encoder_hidden_states is not None:
            # Rows of one sample, its frames or its cells, are neighbours.
            bias = bias.repeat_interleave(len(encoder_hidden_states) // len(bias), dim=0)
        attended: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask=bias)
        return attended


class PreparedCrossAttention:
    """Attention of one block to keys and values that stand at `start` and `start + width` of the prepared context."""

    def __init__(self, source: ContextSource, start: int, width: int) -> None:
        self.source = source
        self.start = start
        self.width = width

    def __call__(self, attn: Attention, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        states, bias = self.source.states, self.source.bias
        assert states is not None
        assert bias is not None
        query = attn.to_q(hidden_states)
        samples, head_width = self.source.samples, self.width // attn.heads
        # Said in full: finding out what a -1 stands for takes the exporter minutes, so large are the terms of a video's sizes.
        rows = query.shape[0] // samples * query.shape[1]
        folded = query.reshape(samples, rows, attn.heads, head_width).transpose(1, 2)
        key, value = (
            states[..., begin : begin + self.width].unflatten(-1, (attn.heads, head_width)).transpose(1, 2)
            for begin in (self.start, self.start + self.width)
        )
        attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=bias[:, None])
        attended = attended.transpose(1, 2).reshape(hidden_states.shape[0], hidden_states.shape[1], self.width)
        output: Tensor = attn.to_out[0](attended) / attn.rescale_output_factor
        return output
