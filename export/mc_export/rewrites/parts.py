"""What the rewritten blocks of several backbones share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mc_runtime.errors import EngineError


def merged_linear(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Linear layers of one input as one product; their outputs lie side by side.

    Raises:
        EngineError: some have a bias and some have none.
    """
    biases = [layer.bias for layer in layers]
    if len({bias is None for bias in biases}) > 1:
        raise EngineError("projections with and without a bias do not merge; build it for another target")
    weight = torch.cat([layer.weight.detach() for layer in layers])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=biases[0] is not None, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if biases[0] is not None:
        merged.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return merged


def norm_modulated(norm: nn.Module, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The norm and modulation that no residual precedes: a stack's first."""
    normed: Tensor = norm(h) * (1 + scale) + shift
    return normed
