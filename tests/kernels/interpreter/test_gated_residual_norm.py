from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.gated_residual_norm import gated_residual_norm_reference, gated_residual_norm_triton, tokens_per_program
from tests.kernels.numerics import DTYPES, assert_close, draw

SHAPES = [(1, 63, 64), (2, 9, 100), (3, 5, 123), (2, 1, 33)]  # B, N, D: ragged tokens in the last program, ragged widths


def inputs(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    B, _, D = shape
    modulation = draw(generator, B, tokens, 6, D, dtype=dtype)
    h, y = draw(generator, *shape, dtype=dtype), draw(generator, *shape, dtype=dtype)
    return [h, y, modulation[:, :, 2], modulation[:, :, 3], modulation[:, :, 4]]


@pytest.fixture(autouse=True)
def several_tokens_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_kernels.gated_residual_norm.tokens_per_program", lambda batch, tokens: 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["shared", "per_token"])
def test_equals_float64(shape: tuple[int, int, int], per_token: bool, dtype: torch.dtype) -> None:
    tensors = inputs(shape, shape[1] if per_token else 1, dtype)
    h, u = gated_residual_norm_triton(*tensors)
    exact_h, exact_u = gated_residual_norm_reference(*(tensor.double() for tensor in tensors))
    assert_close(h, exact_h, "h")
    assert_close(u, exact_u, "u")


def test_without_a_gate() -> None:
    h, y, _, shift, scale = inputs((2, 5, 40), 1, torch.bfloat16)
    summed, u = gated_residual_norm_triton(h, y, None, shift, scale)
    exact_h, exact_u = gated_residual_norm_reference(h.double(), y.double(), None, shift.double(), scale.double())
    assert_close(summed, exact_h, "h")
    assert_close(u, exact_u, "u")


def test_programs_take_many_tokens_only_where_there_are_enough() -> None:
    assert tokens_per_program(batch=2, tokens=1024) == 4
    assert tokens_per_program(batch=2, tokens=27280) == 16
    assert tokens_per_program(batch=1, tokens=5) == 1
