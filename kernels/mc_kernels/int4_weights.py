"""Weights of 4 bits with a scale for each block of a column: what TensorRT multiplies 16-bit inputs with.

    w_kj = c_kj * s_bj         b = floor(k / block)         c whole numbers from -8 to 7, s bfloat16 numbers

A scale is the one that rounds its block with the smallest squared error, of those that cut nothing off (largest / 7) and those
that cut off up to 40 %. Scales are bfloat16 numbers, so that they are the same in float32 and bfloat16; their products with
codes are rounded once, to the type that is computed in. Inputs are not rounded, so nothing depends on what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = (128, 64, 32)
"""Lengths of a block; a matrix has the longest that divides its input width. 128 is what AWQ and GPTQ files have."""
MULTIPLE = 16
"""Of a matrix's output width: rows of codes are whole bytes and lie aligned."""
CAPABILITY = (8, 0)
"""The first whose GPUs TensorRT for RTX compiles 4-bit weights for."""
_LOWEST, _HIGHEST = -8, 7
_SMALLEST = 1e-12  # what a block of zeros has for its largest value
_RATIOS = tuple(1 - step / 40 for step in range(17))


def block_of(width: int) -> int | None:
    """The length of the blocks of a matrix with this input width; None where there is none."""
    return next((block for block in BLOCKS if width % block == 0), None)


def quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes `[K, N]` (int8, from -8 to 7) and scales `[K / block, N]` (bfloat16 numbers in float32) of a weight `[N, K]`."""
    blocks = weight.detach().float().T.unflatten(0, (-1, block))
    whole = (blocks.abs().amax(dim=1, keepdim=True) / _HIGHEST).clamp_min(_SMALLEST)
    best, scale = torch.full_like(whole, torch.inf), whole
    for ratio in _RATIOS:
        tried = (whole * ratio).bfloat16().float()
        error = ((blocks / tried).round().clamp(_LOWEST, _HIGHEST) * tried - blocks).square().sum(dim=1, keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    codes = (blocks / scale).round().clamp(_LOWEST, _HIGHEST).to(torch.int8)
    return codes.flatten(0, 1).contiguous(), scale[:, 0].contiguous()


@torch.library.custom_op("mc_kernels::int4_weights", mutates_args=())
def int4_weights(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """The module's formula: codes `[K, N]` by scales `[K / block, N]`, in the scales' dtype."""
    return codes.to(scale.dtype) * scale.repeat_interleave(block, dim=0)


@int4_weights.register_fake
def _(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=scale.dtype)
