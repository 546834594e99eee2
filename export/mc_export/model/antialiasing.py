"""Stable Video Diffusion's way of making a picture smaller, as one matrix a side.

A Gaussian blur as wide as the picture is too large (reflected at the edges), then cubic interpolation whose first and last
samples lie on the picture's: `_resize_with_antialiasing` of diffusers' `pipeline_stable_video_diffusion`. Both are linear and
work on each side alone. Positions are integers here, which no precision of an engine rounds; what is left for floats is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CUBIC = -0.75  # torch's coefficient of cubic interpolation
_TAPS = 4


def antialiased_resize_matrix(source: int, target: int, device: torch.device | None = None) -> Tensor:
    """Weights `[target, source]`; every row sums to one.

    Args:
        source: pixels along the side, at least 2; may be symbolic.
        target: pixels it is resized to, even.
    """
    last = torch.full((), source - 1, dtype=torch.int64, device=device)
    columns = torch.arange(source, device=device)
    # Sample i lies at i * (source - 1) / (target - 1); its taps are the pixel before it, two after, and one more before.
    scaled = torch.arange(target, device=device) * last
    before = scaled // (target - 1)
    offset = (scaled - before * (target - 1)).float() / (target - 1)
    taps = (before[:, None] + torch.arange(-1, _TAPS - 1, device=device)).clamp_min(0).minimum(last)
    # The kernel is odd, at least 3 wide, else 4 sigma, with sigma = (source / target - 1) / 2.
    excess = (last + 1 - target).clamp_min(0)
    width = (2 * excess // target).clamp_min(3)
    reach = width // 2
    sigma = (excess.float() / (2 * target)).clamp_min(0.001)

    def blurred(distance: Tensor) -> Tensor:
        inside = distance.abs() <= reach
        return torch.where(inside, (-0.5 * (distance.float() / sigma).square()).exp(), 0.0)

    centres = taps[..., None]
    weights = blurred(columns - centres)
    weights = weights + torch.where(columns > 0, blurred(columns + centres), 0.0)
    weights = weights + torch.where(columns < last, blurred(2 * last - columns - centres), 0.0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (_cubic_weights(offset)[..., None] * weights).sum(dim=1)


def _cubic_weights(offset: Tensor) -> Tensor:
    """Of the four taps around a sample `offset` behind the second: `[..., 4]`."""
    distance = torch.stack([offset + 1, offset, 1 - offset, 2 - offset], dim=-1)
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance.square() + 1
    far = ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
    return torch.where(distance <= 1, near, far)
