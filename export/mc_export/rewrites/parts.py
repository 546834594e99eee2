"""What the rewritten blocks of several backbones share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mc_export.quantize.fp8.layers import Fp8Linear, Pointwise
from mc_kernels.gated_residual_norm import gated_residual_norm
from mc_runtime.errors import EngineError


class Stream(NamedTuple):
    """Tokens between two sublayers: `h + gate * y`, not added up yet, for that is done in one pass with the norm that follows.

    Attributes:
        h: the residual stream `[N, S, D]`.
        y: what the last sublayer gave, likewise; None where there was none.
        gate: `[N, 1, D]`, or None for a plain residual.
    """

    h: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None

    def opened(self, norm: Any, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the next sublayer's input: its norm (of no weights) and modulation."""
        if self.y is None:
            return self.h, norm(self.h) * (1 + scale) + shift
        opened: tuple[Tensor, Tensor] = gated_residual_norm(self.h, self.y, self.gate, shift, scale, norm.eps)
        return opened

    def settled(self) -> Tensor:
        """The sum."""
        if self.y is None:
            return self.h
        return self.h + (self.y if self.gate is None else self.gate * self.y)


def as_linear(layer: Any) -> Any:
    """A 1 x 1 convolution, in FP8 or not, as a linear layer on channels that lie last."""
    if isinstance(layer, Pointwise):
        return layer.linear
    linear = nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)
    linear.bias = layer.bias
    return linear


def merged_linear(layers: Sequence[Any]) -> Any:
    """Linear layers of one input as one product; their outputs lie side by side. Of layers in FP8, one in FP8.

    Raises:
        EngineError: some have a bias and some have none, or some are in FP8 and some are not.
    """
    in_fp8 = [isinstance(layer, Fp8Linear) for layer in layers]
    if any(in_fp8) and not all(in_fp8):
        raise EngineError("projections of one input are not all in fp8; run mc-runtime calibrate again")
    biases = [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        raise EngineError("projections with and without a bias do not merge; build it for another target")
    if all(in_fp8):
        return Fp8Linear.merged(list(layers))
    weight = torch.cat([layer.weight.detach() for layer in layers])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=biases[0] is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if biases[0] is not None:
        merged.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return merged
