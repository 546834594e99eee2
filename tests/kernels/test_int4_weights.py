"""Weights of 4 bits: codes, scales, and how near they come."""

from __future__ import annotations

import pytest
import torch

from mc_kernels.int4_weights import block_of, int4_weights, quantize_blocks


@pytest.mark.parametrize(("width", "block"), [(256, 128), (192, 64), (96, 32), (32, 32), (48, None), (5, None)])
def test_the_longest_block_that_fits(width: int, block: int | None) -> None:
    assert block_of(width) == block


@pytest.mark.parametrize(("shape", "block"), [((48, 256), 128), ((16, 192), 64), ((33, 96), 32)])
def test_every_block_is_rounded_by_its_own_scale(shape: tuple[int, int], block: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.01, 10, shape[1])
    codes, scale = quantize_blocks(weight, block)
    assert (codes.dtype, codes.shape) == (torch.int8, (shape[1], shape[0]))
    assert scale.shape == (shape[1] // block, shape[0])
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert torch.equal(scale, scale.bfloat16().float())
    assert (scale > 0).all()
    expanded = torch.stack([scale[row // block] for row in range(shape[1])])
    rounded = int4_weights(codes, scale, block)
    assert torch.equal(rounded, codes.float() * expanded)
    blocks = weight.T.unflatten(0, (-1, block))
    error = (rounded.unflatten(0, (-1, block)) - blocks).square().sum(dim=1)
    whole = blocks.abs().amax(dim=1, keepdim=True) / 7
    plain = ((blocks / whole).round().clamp(-8, 7) * whole - blocks).square().sum(dim=1)
    assert (error <= 1.01 * plain).all(), "scales in bfloat16 may cost what cutting off does not save, and no more"
    assert error.sum() < 0.95 * plain.sum(), "cutting off the largest is worth it"


def test_what_fits_is_exact_and_zeros_stay_zeros() -> None:
    codes = torch.randint(-7, 8, (64, 16), generator=torch.Generator().manual_seed(1))
    codes[0], codes[32] = 7, -7
    weight = (codes * 2.0**-3).T.contiguous()
    weight[5] = 0
    found, scale = quantize_blocks(weight, 32)
    assert torch.equal(int4_weights(found, scale, 32).T, weight)


def test_bfloat16_rounds_the_same_numbers_once() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    codes, scale = quantize_blocks(weight, 128)
    assert torch.equal(int4_weights(codes, scale.bfloat16(), 128), int4_weights(codes, scale, 128).bfloat16())
