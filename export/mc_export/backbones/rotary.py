"""Rotary positions, for attention that turns its queries and its keys alike."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated_heads(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of `[N, S, heads, d]` as pairs, each turned by its angle `[S, d / 2]`; `[N, heads, S, d]`.

    The result has the first channels of all pairs before the second ones. Queries and keys both have them so, and their
    products do not change; putting the pairs together again takes engines longer than turning them.
    """
    first, second = states.unflatten(-1, (-1, 2)).permute(4, 0, 2, 1, 3).unbind(0)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(states.dtype)
