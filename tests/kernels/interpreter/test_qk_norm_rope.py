from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.qk_norm_rope import qk_norm_rope_reference, qk_norm_rope_triton, rotary_tables
from tests.kernels.numerics import DTYPES, assert_close, draw

SHAPES = [(2, 5, 3, 32), (1, 3, 24, 128), (1, 7, 1, 12)]  # B, N, heads, d: ragged heads, production's, ragged width


def inputs(shape: tuple[int, int, int, int], over_heads: bool, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(12)
    B, N, heads, d = shape
    q, k, _ = draw(generator, B, N, 3, heads, d, dtype=dtype).unbind(2)
    weights = draw(generator, 2, heads * d if over_heads else d, dtype=dtype)
    angles = draw(generator, N, d // 2).repeat_interleave(2, dim=1)  # diffusers' tables: every entry twice
    return [q, k, *weights.unbind(0), angles.cos()[:, ::2], angles.sin()[:, ::2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over_heads", [False, True], ids=["flux", "wan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, int, int, int], over_heads: bool, dtype: torch.dtype) -> None:
    tensors = inputs(shape, over_heads, dtype)
    exact = qk_norm_rope_reference(*(tensor.double() for tensor in tensors))
    for what, rotated, reference in zip("qk", qk_norm_rope_triton(*tensors), exact, strict=True):
        assert_close(rotated, reference, what)


@pytest.mark.parametrize("axes", [(4, 6, 6), (8, 4, 4)])
def test_three_axes(axes: tuple[int, ...]) -> None:
    q, k, *weights, _, _ = inputs((1, 12, 2, 16), False, torch.float32)
    positions = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).float()
    tables = rotary_tables(positions, axes)
    exact = qk_norm_rope_reference(*(tensor.double() for tensor in (q, k, *weights, *tables)))
    assert_close(qk_norm_rope_triton(q, k, *weights, *tables)[0], exact[0], "q")
