"""One comparison for all kernels: against float64, with the tolerance of the type the result is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

# Kernels and references compute in float32 and round once, to nearest: half a unit in the last place is 2**-9 for bfloat16,
# 2**-12 for float16. The tolerance is one unit, and the absolute part is what float32 sums of values near 1 leave.
RELATIVE = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float8_e4m3fn: 2**-3}
ABSOLUTE = 2e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values that the dtype holds exactly."""
    return torch.randn(shape, generator=generator).to(dtype)


def assert_close(actual: Tensor, exact: Tensor, what: str, *, absolute: float = ABSOLUTE) -> None:
    """Raises with the largest and the mean difference unless every element is within the tolerance of `actual`'s dtype.

    Args:
        actual: the result under test.
        exact: the same in float64.
        what: begins the message.
        absolute: allowed whatever the value; a sum of many terms, or of large ones, may need more than `ABSOLUTE`.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, f"{what}: {list(actual.shape)} instead of {list(exact.shape)}"
    difference = (actual.double() - exact).abs()
    allowed = absolute + RELATIVE[actual.dtype] * exact.abs()
    worst = difference.nan_to_num(float("inf")).max().item()
    message = f"{what}: difference up to {worst:.3g}, mean {difference.mean().item():.3g}, {actual.dtype!s}"
    assert bool((difference <= allowed).all()), message
