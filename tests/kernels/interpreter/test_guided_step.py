from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mc_kernels.guided_step import guided_step_reference, guided_step_triton
from tests.kernels.numerics import DTYPES, assert_close, draw


def inputs(latent: tuple[int, ...], branches: int, order: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    predictions, guidance = draw(generator, 2, branches, *latent, dtype=dtype), draw(generator, 2, branches)
    tensors = [predictions, guidance, draw(generator, 2, 1 + 2 * order), draw(generator, 2, *latent)]
    if order > 1:
        tensors.append(draw(generator, 2, 2 * (order - 1), *latent))
    return tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("latent", "branches"), [((4, 5, 123), 2), ((3, 7, 1, 9), 1), ((63,), 3)])
def test_equals_float64(latent: tuple[int, ...], branches: int, order: int, dtype: torch.dtype) -> None:
    tensors = inputs(latent, branches, order, dtype)
    sample, history = guided_step_triton(*tensors)
    exact_sample, exact_history = guided_step_reference(*(tensor.double() for tensor in tensors))
    assert_close(sample, exact_sample, "sample")
    assert history.shape == exact_history.shape == (2, 2 * (order - 1), *latent)
    if order > 1:
        assert_close(history, exact_history, "history")


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("latent", "branches"), [((4, 5, 3, 13), 2), ((3, 1, 7, 9), 1), ((4, 31, 5, 6), 3)])
def test_a_weight_for_each_frame(latent: tuple[int, ...], branches: int, order: int) -> None:
    tensors = inputs(latent, branches, order, torch.bfloat16)
    tensors[1] = draw(torch.Generator().manual_seed(17), 2, branches, latent[1])
    exact_sample, exact_history = guided_step_reference(*(tensor.double() for tensor in tensors))
    sample, history = guided_step_triton(*tensors)
    assert_close(sample, exact_sample, "sample")
    if order > 1:
        assert_close(history, exact_history, "history")
    plain = (tensors[0].double() * tensors[1].double()[:, :, None, :, None, None]).sum(dim=1)
    if order == 1:
        coefficients = tensors[2].double()[:, :, None, None, None, None]
        assert_close(sample, coefficients[:, 1] * tensors[3].double() + coefficients[:, 2] * plain, "by hand")


def test_half_precision_latents() -> None:
    tensors = inputs((4, 3, 5), 2, 3, torch.bfloat16)
    tensors[3:] = [tensor.bfloat16() for tensor in tensors[3:]]
    sample, history = guided_step_triton(*tensors)
    exact_sample, exact_history = guided_step_reference(*(tensor.double() for tensor in tensors))
    assert_close(sample, exact_sample, "sample")
    assert_close(history, exact_history, "history")
