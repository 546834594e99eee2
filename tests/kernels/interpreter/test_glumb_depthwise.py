from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.glumb_depthwise import glumb_depthwise_reference, glumb_depthwise_triton, rows_per_program, taps_from_conv
from tests.kernels.numerics import DTYPES, assert_close, draw

# B, H, W, C: one cell, strips that end inside the image, one band and several, ragged channels
SHAPES = [(1, 1, 1, 3), (2, 5, 6, 40), (1, 17, 4, 100)]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + [((1, 5, 123, 17), torch.bfloat16)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10)
    B, H, W, C = shape
    p = draw(generator, B, H, W, 2 * C, dtype=dtype)
    return [p, taps_from_conv(draw(generator, 2 * C, 1, 3, 3)), draw(generator, 2 * C, dtype=dtype)]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_equals_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    assert_close(glumb_depthwise_triton(*tensors), glumb_depthwise_reference(*(tensor.double() for tensor in tensors)), "o")


def test_values_far_from_zero_stay_finite() -> None:
    p = torch.tensor([-3e4, -100.0, -60.0, -1.0, 0.0, 1.0, 60.0, 3e4]).reshape(1, 2, 2, 2)
    _, taps, bias = inputs((1, 2, 2, 1), torch.float32)
    exact = glumb_depthwise_reference(p.double(), taps.double(), bias.double())
    assert_close(glumb_depthwise_triton(p, taps, bias), exact, "o", absolute=1e-5 * exact.abs().max().item())


def test_walks_are_long_where_channels_alone_fill_the_gpu() -> None:
    assert rows_per_program(others=2 * 8 * 22, height=32) == 11
    assert rows_per_program(others=62 * 10 * 30, height=22) == 22
