"""Ends one half of a transformer block and opens the next: gated residual, LayerNorm, modulation.

    h' = h + gate * y                                   gate of all ones where there is none
    u  = LayerNorm(h') * (1 + scale) + shift            no weights in the norm

An affine norm is the same with scale = weight - 1 and shift = bias. Source: the lines between two sublayers in diffusers'
``SanaTransformerBlock``, ``FluxTransformerBlock`` and ``WanTransformerBlock``. One read of h and y, one write of h' and u; a
program takes several tokens of one sample and keeps the modulation in registers when all of them share it. All sums are in
float32; u is taken from h' before h' is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.checks import Operands, accumulation_dtype, split_width
from mc_kernels.language import tl, triton
from mc_kernels.launch import clamped, launch, shows_kernels
from mc_kernels.rows import load_row, norm_modulate, store_row, wide

ENOUGH_PROGRAMS = 512  # about four for each of an H100's or H200's 132 multiprocessors


def gated_residual_norm_reference(
    h: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `gated_residual_norm`."""
    compute = accumulation_dtype(h)
    added = y.to(compute) if gate is None else gate.to(compute) * y.to(compute)
    summed = h.to(compute) + added
    u = F.layer_norm(summed, summed.shape[-1:], eps=eps) * (1 + scale.to(compute)) + shift.to(compute)
    return summed.to(h.dtype).contiguous(), u.to(h.dtype).contiguous()


@triton.jit
def gated_residual_norm_kernel(
    h_ptr, y_ptr, gate_ptr, shift_ptr, scale_ptr, out_ptr, u_ptr,
    N, D, eps, chunks, tokens_per_program,
    stride: tl.int64, gate_stride_b: tl.int64, gate_stride_n: tl.int64,
    shift_stride_b: tl.int64, shift_stride_n: tl.int64, scale_stride_b: tl.int64, scale_stride_n: tl.int64,
    HEAD: tl.constexpr, TAIL: tl.constexpr, GATED: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """One program: up to `tokens_per_program` tokens of one sample. `stride` is D, in 64 bits."""
    program = tl.program_id(0)
    b = wide(program // chunks)
    first = program % chunks * tokens_per_program
    last = tl.minimum(first + tokens_per_program, N)

    a = tl.arange(0, HEAD)
    z = HEAD + tl.arange(0, TAIL)
    mask_a = a < D
    mask_z = z < D
    gate_ptr += b * gate_stride_b + wide(first) * gate_stride_n
    shift_ptr += b * shift_stride_b + wide(first) * shift_stride_n
    scale_ptr += b * scale_stride_b + wide(first) * scale_stride_n
    if not PER_TOKEN:
        shift_a = load_row(shift_ptr, a, mask_a)
        shift_z = load_row(shift_ptr, z, mask_z)
        scale_a = load_row(scale_ptr, a, mask_a)
        scale_z = load_row(scale_ptr, z, mask_z)
        if GATED:
            gate_a = load_row(gate_ptr, a, mask_a)
            gate_z = load_row(gate_ptr, z, mask_z)

    token = (b * N + first) * stride
    h_ptr += token
    y_ptr += token
    out_ptr += token
    u_ptr += token
    for _ in range(first, last):
        if PER_TOKEN:
            shift_a = load_row(shift_ptr, a, mask_a)
            shift_z = load_row(shift_ptr, z, mask_z)
            scale_a = load_row(scale_ptr, a, mask_a)
            scale_z = load_row(scale_ptr, z, mask_z)
            if GATED:
                gate_a = load_row(gate_ptr, a, mask_a)
                gate_z = load_row(gate_ptr, z, mask_z)
                gate_ptr += gate_stride_n
            shift_ptr += shift_stride_n
            scale_ptr += scale_stride_n
        y_a = load_row(y_ptr, a, mask_a)
        y_z = load_row(y_ptr, z, mask_z)
        if GATED:
            y_a *= gate_a
            y_z *= gate_z
        h_a = load_row(h_ptr, a, mask_a) + y_a
        h_z = load_row(h_ptr, z, mask_z) + y_z
        store_row(out_ptr, a, h_a, mask_a)
        store_row(out_ptr, z, h_z, mask_z)
        u_a, u_z = norm_modulate(h_a, h_z, mask_a, mask_z, shift_a, shift_z, scale_a, scale_z, D, eps)
        store_row(u_ptr, a, u_a, mask_a)
        store_row(u_ptr, z, u_z, mask_z)
        h_ptr += stride
        y_ptr += stride
        out_ptr += stride
        u_ptr += stride


def configuration(width: int, gated: bool, per_token: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    head, tail = split_width(width)
    return {"HEAD": head, "TAIL": tail, "GATED": gated, "PER_TOKEN": per_token, "num_warps": 4 if width > 512 else 1}


def tokens_per_program(batch: int, tokens: int) -> int:
    """As many tokens as share one load of the modulation, at most 16, while every multiprocessor keeps several programs."""
    return clamped(batch * tokens // ENOUGH_PROGRAMS, 1, 16)


def gated_residual_norm_triton(
    h: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments as `gated_residual_norm`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernel is not written for.
    """
    operands = Operands("gated_residual_norm", h.device)
    operands.add("h", h, ("B", "N", "D"))
    operands.add("y", y, ("B", "N", "D"))
    B, N, D = h.shape
    per_token = shift.ndim == 3 and shift.shape[1] != 1
    modulation: tuple[str | int, ...] = ("B", "N" if per_token else 1, "D")
    for name, tensor in (("gate", gate), ("shift", shift), ("scale", scale)):
        if tensor is not None:
            operands.add(name, tensor, modulation, layout="rows")
    count = tokens_per_program(B, N)
    chunks = -(-N // count)
    grid = (B * chunks,)
    operands.launchable(grid)
    out, u = torch.empty_like(h), torch.empty_like(h)
    gate_or_any = shift if gate is None else gate
    strides = [(tensor.stride(0), tensor.stride(1) if per_token else 0) for tensor in (gate_or_any, shift, scale)]
    launch(
        gated_residual_norm_kernel, grid, h, y, gate_or_any, shift, scale, out, u, N, D, eps, chunks, count, D,
        *strides[0], *strides[1], *strides[2], **configuration(D, gate is not None, per_token),
    )  # fmt: skip
    return out, u


@torch.library.custom_op("mc_kernels::gated_residual_norm", mutates_args=())
def gated_residual_norm(
    h: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """h' and u of the module's formula; the kernel on CUDA tensors, the reference on others.

    Args:
        h: the residual stream ``[B, N, D]``.
        y: the sublayer's output ``[B, N, D]``.
        gate: ``[B, 1, D]``, ``[B, N, D]`` where tokens carry their own timestep, or None for a plain residual.
        shift: likewise, never None; strided views welcome.
        scale: likewise.
        eps: of the norm.

    Returns:
        h' and u, ``[B, N, D]``, in h's dtype.
    """
    if not h.is_cuda:
        return gated_residual_norm_reference(h, y, gate, shift, scale, eps)
    return gated_residual_norm_triton(h, y, gate, shift, scale, eps)


@gated_residual_norm.register_fake
def _(h: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape)


shows_kernels(gated_residual_norm, gated_residual_norm_triton)
