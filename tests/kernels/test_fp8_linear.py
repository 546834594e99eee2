"""FP8's codes and scales to the bit, its products to float32's rounding, against torch's own casts and `torch._scaled_mm`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.canvas_inject import canvas_inject_fp8_reference
from mc_kernels.fp8_linear import (
    FP8_MAX,
    fp8_linear,
    fp8_linear_scaled,
    fp8_product,
    quantize_rows,
)
from mc_kernels.fp8_round import fp8_round, fp8_weights, power_of_two_scale

E4M3 = torch.float8_e4m3fn


def every_code() -> Tensor:
    """All finite values of e4m3, without the negative zero."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    return values[values.isfinite() & ~((values == 0) & values.signbit())].unique()


def nearest_code(value: float, codes: list[float]) -> float:
    """Rounding by hand: the nearest finite code, of two equally near ones that with an even last bit."""
    distance = min(abs(value - code) for code in codes)
    near = [code for code in codes if abs(value - code) == distance]
    bits = {code: int(torch.tensor(code).to(E4M3).view(torch.uint8)) for code in near}
    return min(near, key=lambda code: bits[code] % 2)


@pytest.mark.parametrize(("rows", "width"), [(63, 80), (5, 1), (1, 123)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_exact(rows: int, width: int, dtype: torch.dtype) -> None:
    """Against arithmetic that is done in float64 and rounded once, and rounding to codes by hand."""
    generator = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, width, generator=generator) * torch.logspace(-6, 5, rows)[:, None]).to(dtype)
    x[0] = 0
    codes, scale = quantize_rows(x)
    expected = (x.double().abs().amax(dim=-1).clamp_min(1e-12).float().double() / FP8_MAX).float()
    assert torch.equal(scale, expected)
    table = every_code().tolist()
    quotients = (x.double() / scale.double()[:, None]).float().clamp(-FP8_MAX, FP8_MAX)  # one rounding, as a division has
    by_hand = torch.tensor([[nearest_code(value, table) for value in row] for row in quotients[:, :8].tolist()])
    assert torch.equal(codes[:, :8].float(), by_hand)
    assert torch.equal(codes.float(), quotients.to(E4M3).float())
    assert codes[0].float().abs().max() == 0
    assert torch.equal(codes[1:].float().abs().amax(dim=-1), torch.full((rows - 1,), FP8_MAX)), (
        "the largest takes the last code"
    )


@pytest.mark.parametrize(("rows", "width", "channels"), [(1, 16, 16), (63, 80, 48), (5, 336, 160)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_codes(rows: int, width: int, channels: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(3, rows, width, generator=generator), torch.randn(channels, width, generator=generator)
    offset = torch.randn(channels, generator=generator) if bias else None
    codes, scale = quantize_rows(weight)
    result = fp8_linear(x, codes, scale, offset)
    rows_codes, row_scale = quantize_rows(x)
    terms = rows_codes.double()[..., None, :] * row_scale.double()[..., None, None] * codes.double() * scale.double()[:, None]
    exact = terms.sum(dim=-1) + (0 if offset is None else offset.double())
    # K additions and three more roundings, of half a unit each, of numbers no larger than the sum of magnitudes.
    allowed = (width + 3) * 2**-24 * (terms.abs().sum(dim=-1) + (0 if offset is None else offset.double().abs()))
    assert ((result.double() - exact).abs() <= allowed).all()
    assert torch.equal(result, fp8_product(rows_codes, row_scale, codes, scale, offset, torch.float32))


@pytest.mark.parametrize(("rows", "width", "channels"), [(7, 64, 48), (130, 336, 80)])
def test_scaled_mm_computes_the_same(rows: int, width: int, channels: int) -> None:
    """torch's own product with scales by row and column, on the CPU: one rounding to bfloat16 apart."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, width, generator=generator).bfloat16()
    codes, scale = quantize_rows(torch.randn(channels, width, generator=generator))
    offset = torch.randn(channels, generator=generator).bfloat16()
    ours, theirs = fp8_linear(x, codes, scale, offset), fp8_linear_scaled(x, codes, scale, offset)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.shape == theirs.shape == (2, rows, channels)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-7)


def test_the_loss_is_that_of_four_significant_bits() -> None:
    x, weight = torch.randn(512, 256), torch.randn(128, 256)
    result, expected = fp8_linear(x, *quantize_rows(weight)), F.linear(x, weight)
    assert 0.02 < (result - expected).norm() / expected.norm() < 0.05  # two operands, 2^-4 at most and a third of it on average


def test_the_canvas_enters_with_the_same_codes() -> None:
    """What `canvas_inject_fp8` gives is what this file makes of its u."""
    x, canvas = torch.randn(1, 1, 6, 4, 64), torch.randn(1, 1, 3, 2, 64)
    shift, scale = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    h, codes, row_scale = canvas_inject_fp8_reference(x, canvas, shift, scale)
    u = F.layer_norm(h, (64,), eps=1e-6) * (1 + scale) + shift
    expected, expected_scale = quantize_rows(u)
    torch.testing.assert_close(row_scale, expected_scale, rtol=1e-5, atol=0)
    assert (codes.float() == expected.float()).float().mean() > 0.99, "a last bit of u may tip a code"


def test_what_does_not_fit_is_an_error() -> None:
    codes, scale = quantize_rows(torch.randn(32, 48))
    with pytest.raises(ValueError, match=r"weight is \[32, 48\] float8_e4m3fn; it must be \[N, K=64\]"):
        fp8_linear(torch.randn(5, 64), codes, scale)
    with pytest.raises(ValueError, match=r"both must be multiples of 16"):
        fp8_linear(torch.randn(5, 24), *quantize_rows(torch.randn(32, 24)))
    with pytest.raises(ValueError, match=r"channel_scale is .* bfloat16"):
        fp8_linear(torch.randn(5, 48), codes, scale.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_with_a_power_of_two_is_exact_in_every_type(dtype: torch.dtype) -> None:
    x = torch.randn(63, 123) * torch.logspace(-4, 3, 63)[:, None]
    scale = power_of_two_scale(x[:40].abs().max())  # the last rows are clamped
    rounded = fp8_round(x.to(dtype), scale.to(dtype))
    quotients = (x.to(dtype).double() / scale.double()).clamp(-FP8_MAX, FP8_MAX)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.double(), quotients.float().to(E4M3).double() * scale.double())
    assert rounded.abs().max() == FP8_MAX * scale


def test_scales_are_the_smallest_powers_of_two() -> None:
    largest = torch.tensor([448.0, 448.1, 447.9, 1.75, 1.7500001, 0.0, 3e38])
    scale = power_of_two_scale(largest)
    assert torch.equal(scale[:5], torch.tensor([1.0, 2.0, 1.0, 2**-8, 2**-7]))
    assert (largest / scale <= FP8_MAX).all()
    assert scale[5] > 0
    assert torch.equal(torch.frexp(scale).mantissa, torch.full((7,), 0.5))


def test_weights_are_their_codes_by_their_scales() -> None:
    weight = torch.randn(48, 80)
    scale = power_of_two_scale(weight.abs().amax(dim=-1))
    codes = (weight / scale[:, None]).to(E4M3)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(fp8_weights(codes, scale.to(dtype)).double(), codes.double() * scale[:, None].double())


@pytest.mark.parametrize("operator", ["fp8_linear", "fp8_product", "fp8_round", "fp8_weights"])
def test_operators_are_sound(operator: str) -> None:
    """torch's own checks of the fake implementation and of tracing with dynamic sizes; its check of schemas knows no e4m3."""
    codes, scale = quantize_rows(torch.randn(32, 48))
    rows, row_scale = quantize_rows(torch.randn(2, 5, 48))
    arguments = {
        "fp8_linear": (torch.randn(2, 5, 48), codes, scale, torch.randn(32)),
        "fp8_product": (rows, row_scale, codes, scale, None, torch.bfloat16),
        "fp8_round": (torch.randn(5, 48), torch.tensor(0.25)),
        "fp8_weights": (codes, power_of_two_scale(scale)),
    }[operator]
    torch.library.opcheck(
        getattr(torch.ops.mc_kernels, operator).default, arguments,
        test_utils=("test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
