"""Rounding to FP8 (e4m3) and back with one scale for a whole tensor: what TensorRT takes as a pair of quantize and dequantize.

    round(x)   = e4m3(clamp(x / s, -448, 448)) * s            s a power of two, known when an engine is built
    weights(c) = c_jk * t_j                                   t_j powers of two, one an output channel

With powers of two both the division and the products are exact, and every result has four significant bits: it is the same in
float32 and bfloat16, on a CPU, in an ONNX graph and on a GPU. e4m3 has an exponent of its own, so such a scale costs at
most one of its sixteen binades and no precision. The products of a matrix multiplication are exact, too; its sums are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_kernels.fp8_linear import FP8_MAX, SMALLEST


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The smallest powers of two, float32, with which values up to `largest` fit into e4m3."""
    fraction, exponent = torch.frexp(largest.double().clamp_min(SMALLEST) / FP8_MAX)  # fractions from 0.5 up to 1
    return torch.ldexp(torch.ones_like(fraction), exponent - (fraction == 0.5).int()).float()


@torch.library.custom_op("mc_kernels::fp8_round", mutates_args=())
def fp8_round(x: Tensor, scale: Tensor) -> Tensor:
    """`round(x)` of the module's formula, in x's dtype; `scale` is a tensor without dimensions, of x's dtype."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


@fp8_round.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("mc_kernels::fp8_weights", mutates_args=())
def fp8_weights(codes: Tensor, scale: Tensor) -> Tensor:
    """`weights(c)`: codes `[N, K]` by scales `[N]`, in the scales' dtype."""
    return codes.to(scale.dtype) * scale[:, None]


@fp8_weights.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=scale.dtype)
