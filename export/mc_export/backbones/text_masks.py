"""Attention masks of text encoders, built in plain tensor operations because transformers' own do not survive export."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_bias(attention_mask: Tensor, window: int | None = None) -> Tensor:
    """What is added to the scores, `[B, 1, L, L]`: 0 where a row (dim 2) may see a row (dim 3), else the lowest float.

    Args:
        attention_mask: `[B, L]`, 1 at real tokens, right padded, so that no row is without anything to see.
        window: rows a row sees back, itself included; None for all.
    """
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = order[:, None] - order[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    visible = visible[None, None] & (attention_mask != 0)[:, None, None, :]
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)
