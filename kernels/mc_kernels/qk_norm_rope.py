"""RMS norm of queries and keys and their rotary positions, for FLUX and Wan.

    y = x / sqrt(mean(x^2) + eps) * weight              mean over one head (FLUX) or over all heads (Wan)
    o_2i   = y_2i cos_i - y_2i+1 sin_i
    o_2i+1 = y_2i+1 cos_i + y_2i sin_i                  i < d / 2: neighbours are a pair, in both models

A weight of width d is FLUX's convention, one of heads * d is Wan's. The angles of a token at (t, h, w) are its three
coordinates times their own frequencies, side by side (`rotary_tables`). Source: ``FluxAttnProcessor`` and ``WanAttnProcessor``
of diffusers, with ``apply_rotary_emb``. One read and one write of q and k; a program takes one token, all its heads, and loads
its angles once. Everything is in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mc_kernels.checks import Operands, accumulation_dtype, next_power_of_two, split_width
from mc_kernels.language import tl, triton
from mc_kernels.launch import launch, shows_kernels
from mc_kernels.rows import wide


def rotary_tables(positions: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of tokens' positions.

    Args:
        positions: ``[N, axes]``, for instance (t, h, w).
        axes: how much of the head's width d each axis gets; FLUX (16, 56, 56), Wan (44, 42, 42).
        theta: base of the frequencies.

    Returns:
        Two float32 ``[N, d / 2]``. diffusers' own tables are ``[N, d]`` with every entry twice: their ``[:, ::2]``.
    """
    if positions.ndim != 2 or positions.shape[1] != len(axes):
        raise ValueError(f"positions are {list(positions.shape)}; pass [N, {len(axes)}], one coordinate for each of {axes}")
    if any(width % 2 for width in axes):
        raise ValueError(f"axes are {axes}; each must be even, for its entries are rotated in pairs")
    angles = []
    for coordinate, width in zip(positions.double().unbind(1), axes, strict=True):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(coordinate[:, None] / theta**exponents)
    joined = torch.cat(angles, dim=1)
    return joined.cos().float(), joined.sin().float()


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    compute = accumulation_dtype(x)
    values = x.to(compute)
    over_heads = weight.shape[0] != x.shape[-1]
    square = values.square().mean(dim=(-2, -1) if over_heads else -1, keepdim=True)
    values = values * torch.rsqrt(square + eps) * weight.to(compute).reshape(-1, x.shape[-1])
    even, odd = values.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(compute)[:, None], sin.to(compute)[:, None]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def qk_norm_rope_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `qk_norm_rope`."""
    return _norm_rotate(q, q_weight, cos, sin, eps), _norm_rotate(k, k_weight, cos, sin, eps)


@triton.jit
def load_heads(pointer, heads_of_block, columns, head_stride, mask):
    return tl.load(pointer + heads_of_block[:, None] * head_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rotate(values, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Pairs of neighbours `[HEADS, WIDTH]` by the angles `[WIDTH / 2]`."""
    even, odd = tl.split(tl.reshape(values, [HEADS, WIDTH // 2, 2]))
    cos = cos[None, :]
    sin = sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [HEADS, WIDTH])


@triton.jit
def norm_rotate(
    x_ptr, weight_ptr, o_ptr, cos, sin, heads, width, head_stride, eps,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, OVER_HEADS: tl.constexpr,
):  # fmt: skip
    """One token's heads, in two blocks."""
    columns = tl.arange(0, WIDTH)
    a = tl.arange(0, HEAD)
    z = HEAD + tl.arange(0, TAIL)
    mask_a = (a < heads)[:, None] & (columns < width)[None, :]
    mask_z = (z < heads)[:, None] & (columns < width)[None, :]
    x_a = load_heads(x_ptr, a, columns, head_stride, mask_a)
    x_z = load_heads(x_ptr, z, columns, head_stride, mask_z)
    if OVER_HEADS:
        mean = (tl.sum(tl.sum(x_a * x_a, axis=1), axis=0) + tl.sum(tl.sum(x_z * x_z, axis=1), axis=0)) / (heads * width)
        inverse = 1.0 / tl.sqrt(mean + eps)
        x_a *= inverse * load_heads(weight_ptr, a, columns, width, mask_a)
        x_z *= inverse * load_heads(weight_ptr, z, columns, width, mask_z)
    else:
        weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
        x_a *= (1.0 / tl.sqrt(tl.sum(x_a * x_a, axis=1) / width + eps))[:, None] * weight[None, :]
        x_z *= (1.0 / tl.sqrt(tl.sum(x_z * x_z, axis=1) / width + eps))[:, None] * weight[None, :]
    kind = o_ptr.dtype.element_ty
    tl.store(o_ptr + a[:, None] * width + columns[None, :], rotate(x_a, cos, sin, HEAD, WIDTH).to(kind), mask=mask_a)
    tl.store(o_ptr + z[:, None] * width + columns[None, :], rotate(x_z, cos, sin, TAIL, WIDTH).to(kind), mask=mask_z)


@triton.jit
def qk_norm_rope_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, N, heads, width, eps,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    cos_n: tl.int64, cos_i: tl.int64, sin_n: tl.int64, sin_i: tl.int64, out_stride: tl.int64,
    HEAD: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, OVER_HEADS: tl.constexpr,
):  # fmt: skip
    """One program: one token of one sample. `out_stride` is heads * width."""
    token = wide(tl.program_id(0))
    b = wide(tl.program_id(0) // N)
    n = wide(tl.program_id(0) % N)
    pairs = tl.arange(0, WIDTH // 2)
    inside = pairs < width // 2
    cos = tl.load(cos_ptr + n * cos_n + pairs * cos_i, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + n * sin_n + pairs * sin_i, mask=inside, other=0.0).to(tl.float32)
    norm_rotate(
        q_ptr + b * q_b + n * q_n, q_weight_ptr, q_out_ptr + token * out_stride, cos, sin, heads, width, q_h, eps,
        HEAD, TAIL, WIDTH, OVER_HEADS,
    )  # fmt: skip
    norm_rotate(
        k_ptr + b * k_b + n * k_n, k_weight_ptr, k_out_ptr + token * out_stride, cos, sin, heads, width, k_h, eps,
        HEAD, TAIL, WIDTH, OVER_HEADS,
    )  # fmt: skip


def configuration(heads: int, width: int, over_heads: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    head, tail = split_width(heads)
    return {
        "HEAD": head, "TAIL": tail, "WIDTH": next_power_of_two(width), "OVER_HEADS": over_heads,
        "num_warps": 4 if heads * width > 512 else 1,
    }  # fmt: skip


def qk_norm_rope_triton(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments as `qk_norm_rope`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernel is not written for.
    """
    operands = Operands("qk_norm_rope", q.device)
    operands.add("q", q, ("B", "N", "heads", "d"), layout="rows")
    operands.add("k", k, ("B", "N", "heads", "d"), (q.dtype,), layout="rows")
    B, N, heads, width = q.shape
    operands.require(width % 2 == 0, f"heads are {width} wide; entries are rotated in pairs, so pass an even width")
    over_heads = q_weight.shape[0] != width
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        operands.add(name, weight, (heads * width if over_heads else width,))
    for name, table in (("cos", cos), ("sin", sin)):
        operands.add(name, table, ("N", width // 2), (torch.float32,), layout="strided")
    grid = (B * N,)
    operands.launchable(grid)
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    launch(
        qk_norm_rope_kernel, grid, q, k, q_weight, k_weight, cos, sin, q_out, k_out, N, heads, width, eps,
        *q.stride()[:3], *k.stride()[:3], *cos.stride(), *sin.stride(), heads * width,
        **configuration(heads, width, over_heads),
    )  # fmt: skip
    return q_out, k_out


@torch.library.custom_op("mc_kernels::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated q and k; the kernel on CUDA tensors, the reference on others.

    Args:
        q: ``[B, N, heads, d]``; views of a merged projection welcome.
        k: likewise.
        q_weight: ``[d]`` to normalise each head on its own (FLUX), ``[heads * d]`` to normalise all together (Wan).
        k_weight: likewise.
        cos: float32 ``[N, d / 2]``, any strides (diffusers' tables: ``[:, ::2]``).
        sin: likewise.
        eps: of the norm.

    Returns:
        q and k, ``[B, N, heads, d]``, contiguous, in their dtype.
    """
    if not q.is_cuda:
        return qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps)
    return qk_norm_rope_triton(q, k, q_weight, k_weight, cos, sin, eps)


@qk_norm_rope.register_fake
def _(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


shows_kernels(qk_norm_rope, qk_norm_rope_triton)
