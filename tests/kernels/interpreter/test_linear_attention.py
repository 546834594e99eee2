from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.linear_attention import linear_attention_reference, linear_attention_triton, token_splits
from tests.kernels.numerics import DTYPES, assert_close, draw

SHAPES = [(2, 63, 2), (1, 100, 3), (3, 5, 1), (1, 257, 1), (2, 128, 1)]  # B, N, heads: ragged and full blocks


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one merged projection, as the operator gets them."""
    B, N, heads = shape
    q, k, v = draw(torch.Generator().manual_seed(9), B, N, 3, heads, 32, dtype=dtype).unbind(2)
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_equals_float64(shape: tuple[int, int, int], splits: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(shape, dtype)
    attended = linear_attention_triton(q, k, v, splits=splits)
    assert attended.is_contiguous()
    assert_close(attended, linear_attention_reference(q.double(), k.double(), v.double()), "o")


@pytest.mark.parametrize("splits", [1, 4])
def test_queries_and_keys_that_relu_to_zero_attend_to_nothing(splits: int) -> None:
    q, k, v = inputs((1, 40, 1), torch.float32)
    attended = linear_attention_triton(-q.abs(), k, v, splits=splits)
    assert torch.equal(attended, torch.zeros_like(attended))
    attended = linear_attention_triton(q, -k.abs(), v, splits=splits)
    assert torch.equal(attended, torch.zeros_like(attended))


def test_splits_of_different_lengths_give_the_same_numbers() -> None:
    q, k, v = inputs((1, 63, 1), torch.float32)
    whole = linear_attention_reference(q.double(), k.double(), v.double())
    for splits in (2, 7, 20, 63):
        assert_close(linear_attention_triton(q, k, v, splits=splits), whole, f"{splits} splits")


def test_images_are_split_and_videos_are_not() -> None:
    assert token_splits(rows=2 * 70, tokens=1024) == 4
    assert token_splits(rows=96, tokens=4096) == 6
    assert token_splits(rows=62 * 96, tokens=880) == 1
    assert token_splits(rows=2, tokens=100) == 1
