"""Linear interpolation of a canvas to a latent grid (paper, section 3.4, step 2).

``torch.nn.functional.interpolate(..., mode="linear"-family, align_corners=False)`` along t, h and w is separable, so each
axis is one small matrix product. Written that way, the sizes stay symbolic through ``torch.export`` and every target runs it
as a GEMM; a resize operator of rank five is not available everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_resize_matrix(source: int, target: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights ``[target, source]`` of a linear resize with half-pixel centres; the identity when the sizes agree."""
    centres = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * (source / target) - 0.5
    centres = centres.clamp(min=0).minimum(torch.full((), source - 1, device=device, dtype=torch.float32))
    columns = torch.arange(source, device=device, dtype=torch.float32)
    return (1 - (centres[:, None] - columns[None, :]).abs()).clamp_min(0).to(dtype)


def resize_grid(grid: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Interpolates a grid of vectors linearly.

    Args:
        grid: ``[..., t, h, w, D]``.
        size: the target ``(T, H, W)``.

    Returns:
        ``[..., T, H, W, D]``, equal to ``torch.nn.functional.interpolate`` with ``mode="trilinear"``.
    """
    t, h, w = grid.shape[-4:-1]
    resize_t, resize_h, resize_w = (
        linear_resize_matrix(source, target, grid.device, grid.dtype) for source, target in zip((t, h, w), size, strict=True)
    )
    grid = torch.matmul(resize_w, grid)  # the last axis but one first: each product reads the fewest elements so far
    grid = torch.matmul(resize_h, grid.flatten(-2)).unflatten(-1, (size[2], grid.shape[-1]))
    if isinstance(t, int) and t == 1:  # a picture's, or one keyframe for all frames: no product over the finished grid
        return grid.expand(*grid.shape[:-4], *size, grid.shape[-1])
    return torch.matmul(resize_t, grid.flatten(-3)).unflatten(-1, (size[1], size[2], grid.shape[-1]))
