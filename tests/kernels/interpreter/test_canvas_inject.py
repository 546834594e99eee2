from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.canvas_inject import (
    FP8_MAX,
    canvas_inject_fp8_reference,
    canvas_inject_reference,
    canvas_inject_triton,
    columns_per_program,
)
from tests.kernels.numerics import DTYPES, assert_close, draw

Grid = tuple[int, int, int]

# batch, latents (T, H, W), canvas (t, h, w), D: equal grids, one frame for many, keyframes, down, one cell, ragged widths
SHAPES: list[tuple[int, Grid, Grid, int]] = [
    (2, (1, 3, 4), (1, 3, 4), 64),
    (2, (3, 2, 5), (1, 2, 5), 63),
    (1, (5, 3, 4), (3, 2, 2), 100),
    (1, (2, 2, 5), (3, 6, 17), 32),
    (1, (1, 2, 9), (1, 1, 1), 1),
]
CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
CASES += [((1, (1, 2, 123), (1, 3, 31), 48), torch.bfloat16)]  # many walks, the last one short


def inputs(shape: tuple[int, Grid, Grid, int], dtype: torch.dtype) -> list[Tensor]:
    batch, size, grid, width = shape
    generator = torch.Generator().manual_seed(7)
    modulation = draw(generator, batch, size[0], 6, width, dtype=dtype)
    x, canvas = draw(generator, batch, *size, width, dtype=dtype), draw(generator, batch, *grid, width, dtype=dtype)
    return [x, canvas, modulation[:, :, 0], modulation[:, :, 3]]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.fixture
def long_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small grids walk one cell a program unless told otherwise."""
    monkeypatch.setattr("mc_kernels.canvas_inject.columns_per_program", lambda rows, width: 16)


def assert_h_and_u_equal_float64(shape: tuple[int, Grid, Grid, int], dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    h, u, row_scale = canvas_inject_triton(*tensors)
    exact_h, exact_u = canvas_inject_reference(*exact(tensors))
    assert row_scale is None
    assert_close(h, exact_h, "h")
    assert_close(u, exact_u, "u")


@pytest.mark.usefixtures("long_walks")
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_h_and_u_equal_float64(shape: tuple[int, Grid, Grid, int], dtype: torch.dtype) -> None:
    assert_h_and_u_equal_float64(shape, dtype)


def test_walks_of_one_cell() -> None:
    assert columns_per_program(rows=5 * 3, width=4) == 1
    assert_h_and_u_equal_float64(SHAPES[2], torch.bfloat16)


@pytest.mark.usefixtures("long_walks")
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_codes_and_their_scale(shape: tuple[int, Grid, Grid, int]) -> None:
    tensors = inputs(shape, torch.bfloat16)
    h, codes, row_scale = canvas_inject_triton(*tensors, fp8=True)
    assert row_scale is not None
    exact_h, exact_u = canvas_inject_reference(*exact(tensors))
    assert_close(h, exact_h, "h")
    assert_close(row_scale, exact_u.abs().amax(-1) / FP8_MAX, "row_scale")
    assert codes.dtype == torch.float8_e4m3fn
    decoded = codes.double() * row_scale.double()[..., None]
    # Half a unit of e4m3 is 2**-4 of the value, or of the smallest normal code, 2**-6, below that.
    unit = torch.maximum(exact_u.abs(), row_scale.double()[..., None] * 2**-6)
    assert bool(((decoded - exact_u).abs() <= 1.001 * 2**-4 * unit).all())
    _, reference_codes, reference_scale = canvas_inject_fp8_reference(*tensors)
    assert_close(row_scale, reference_scale.double(), "row_scale")
    assert (codes.view(torch.uint8) == reference_codes.view(torch.uint8)).float().mean() > 0.99  # the rest are ties


def test_a_row_of_zeros_has_finite_codes() -> None:
    x, canvas = torch.zeros(1, 1, 1, 2, 16), torch.zeros(1, 1, 1, 2, 16)
    shift = torch.zeros(1, 1, 16)
    _, codes, row_scale = canvas_inject_triton(x, canvas, shift, shift, fp8=True)
    assert row_scale is not None
    assert bool((codes.float() == 0).all())
    assert bool((row_scale > 0).all())


def test_walks_are_long_only_where_there_are_enough_rows() -> None:
    assert columns_per_program(rows=2 * 32, width=32) == 4
    assert columns_per_program(rows=31 * 22 * 2, width=40) == 16
