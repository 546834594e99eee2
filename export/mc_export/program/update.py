"""The end of a step: guidance over branches, then the sampler's linear multistep update."""

from __future__ import annotations

import torch
from torch import Tensor


def guided_update(
    prediction: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The next sample and, above order 1, the next history.

    Args:
        prediction: `[B, G, C, (T,) H, W]`, branch by branch, in whatever the backbone computes in.
        guidance: weights of the branches `[B, G]` or, one a frame, `[B, G, T]`.
        coefficients: `[B, 1 + 2 order]`; the first, the input's scale, is the model's and not used here.
        sample: `[B, C, (T,) H, W]`.
        history: `[B, 2 (order - 1), C, (T,) H, W]`: previous samples, newest first, then previous predictions, newest first.
    """
    ones = (1,) * (sample.ndim - 1)
    weights = coefficients[:, 1:].unflatten(1, (-1, *ones))
    per_branch = guidance[:, :, None, :, None, None] if guidance.ndim == 3 else guidance.unflatten(1, (-1, *ones))
    guided = (prediction.float() * per_branch).sum(dim=1)
    if history is None:
        return weights[:, 0] * sample + weights[:, 1] * guided, None
    order = weights.shape[1] // 2
    samples = torch.cat([sample[:, None], history[:, : order - 1]], dim=1)
    predictions = torch.cat([guided[:, None], history[:, order - 1 :]], dim=1)
    stepped = (weights * torch.cat([samples, predictions], dim=1)).sum(dim=1)
    return stepped, torch.cat([samples[:, :-1], predictions[:, :-1]], dim=1)
