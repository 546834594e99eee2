"""A linear layer in FP8 (e4m3): a row of the input gets its scale while it runs, an output channel of the weights has one.

    s_i  = max(max_k |x_ik|, 1e-12) / 448                  float32, one division
    c_ik = e4m3(clamp(x_ik / s_i, -448, 448))               x in float32, one division, then to the nearest code, ties to even
    y_ij = (sum_k c_ik w_jk) * s_i * t_j + b_j              w and t: the weights' codes and scales, made by the same two lines

Codes and scales are exact to the bit: two correctly rounded divisions and one rounding, whoever does them. A product of two
codes has eight bits and is exact in float32; their sum is rounded there, in no fixed order, the scaled sum gets its bias in
float32 and is rounded once more, to x's type. So results agree within float32's rounding of a sum of K terms, and no closer.
`canvas_inject_fp8` gives the same codes and scales as this file's first two lines. Format: arXiv 2209.05433, E4M3.

On CUDA the product is `torch._scaled_mm` with scales by row and by column: bfloat16 out, K and N multiples of 16, compute
capability 8.9; sums are not the tensor cores' short ones (`use_fast_accum=False`), since the reference's are not. In a package
the first two lines are plain operators, which the compiler may fuse with the norm before them, and whose divisions it may leave
off by up to two in the last place, as Triton's own are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.checks import Operands
from mc_kernels.launch import shows_kernels

FP8_MAX = 448.0  # the largest e4m3 value
MULTIPLE = 16  # of both widths of a weight matrix, for `torch._scaled_mm`
SMALLEST = 1e-12  # what a row of zeros has for its largest value
CAPABILITY = (8, 9)  # the first with e4m3 in its tensor cores


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[..., K]` in e4m3 and a float32 scale for each row, `[...]`."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp_min(SMALLEST) / FP8_MAX
    return (wide / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8_product_reference(
    codes: Tensor, row_scale: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The third line in PyTorch. Arguments as `fp8_product`."""
    sums = F.linear(codes.float(), weight.float()) * row_scale[..., None] * channel_scale
    return (sums if bias is None else sums + bias.float()).to(dtype)


def fp8_product_scaled(
    codes: Tensor, row_scale: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The third line by `torch._scaled_mm`. Arguments as `fp8_product`."""
    rows = codes.reshape(-1, codes.shape[-1])
    product = torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale.reshape(-1, 1), scale_b=channel_scale[None],
        bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16, use_fast_accum=False,
    )  # fmt: skip
    return product.to(dtype).reshape(*codes.shape[:-1], weight.shape[0])


def fp8_linear_reference(x: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in PyTorch. Arguments as `fp8_linear`."""
    return fp8_product_reference(*quantize_rows(x), weight, channel_scale, bias, x.dtype)


def fp8_linear_scaled(x: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula by `torch._scaled_mm`. Arguments as `fp8_linear`."""
    return fp8_product_scaled(*quantize_rows(x), weight, channel_scale, bias, x.dtype)


def _check(name: str, device: torch.device, rows: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None) -> None:
    operands = Operands(name, device)
    operands.sizes["K"] = rows.shape[-1]
    operands.add("weight", weight, ("N", "K"), (torch.float8_e4m3fn,))
    operands.add("channel_scale", channel_scale, ("N",), (torch.float32,))
    if bias is not None:
        operands.add("bias", bias, ("N",))
    N, K = weight.shape
    operands.require(N % MULTIPLE == 0 and K % MULTIPLE == 0, f"weight is [{N}, {K}]; both must be multiples of {MULTIPLE}")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        operands.require(capability >= CAPABILITY, f"e4m3 needs compute capability 8.9, here is {capability}; use bfloat16")


@torch.library.custom_op("mc_kernels::fp8_linear", mutates_args=())
def fp8_linear(x: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The module's formula: by `torch._scaled_mm` on CUDA tensors, by the reference on others.

    Args:
        x: `[..., K]`.
        weight: e4m3 codes `[N, K]`, from `quantize_rows` of the weights.
        channel_scale: float32 `[N]`, likewise.
        bias: `[N]` or None.

    Returns:
        `[..., N]` in x's dtype.

    Raises:
        ValueError: shapes or types that do not belong together, or widths that are no multiples of 16.
    """
    _check("fp8_linear", x.device, x, weight, channel_scale, bias)
    compute = fp8_linear_scaled if x.is_cuda else fp8_linear_reference
    return compute(x, weight, channel_scale, bias)


@fp8_linear.register_fake
def _(x: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("mc_kernels::fp8_product", mutates_args=())
def fp8_product(
    codes: Tensor, row_scale: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """As `fp8_linear`, for an input that is in codes already.

    Args:
        codes: e4m3 `[..., K]`.
        row_scale: float32 `[...]`.
        weight, channel_scale, bias: as `fp8_linear` takes them.
        dtype: of the result.
    """
    _check("fp8_product", codes.device, codes, weight, channel_scale, bias)
    compute = fp8_product_scaled if codes.is_cuda else fp8_product_reference
    return compute(codes, row_scale, weight, channel_scale, bias, dtype)


@fp8_product.register_fake
def _(
    codes: Tensor, row_scale: Tensor, weight: Tensor, channel_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


shows_kernels(fp8_linear, fp8_linear_scaled)
shows_kernels(fp8_product, fp8_product_scaled)
