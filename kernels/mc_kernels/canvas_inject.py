"""Adds the canvas to the latents, normalises and modulates: the entry of the connector's per-step block.

    h = x + R(canvas)                                   R: linear interpolation along t, h and w to x's grid
    u = LayerNorm(h) * (1 + scale) + shift              no weights in the norm
    codes = e4m3(u / row_scale), row_scale = max |u| / 448      optional, one scale for each row

R is ``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``: along an axis of n canvas cells and N latent
cells, cell i sits at c = max((i + 1/2) n / N - 1/2, 0) and mixes the cells floor(c) and floor(c) + 1, the last one clamped.
Source: MetaCanvas (arXiv 2512.11464), section 3.4, steps 2 and 3; the norm is ``SanaTransformerBlock.norm1``.

One read of x and one write of h and of u; the interpolated canvas never exists in memory. A program walks along w and keeps
the two canvas columns on either side, already mixed over t and h, in registers: upsampling by two reads a canvas column for
every second latent. All sums are in float32; u is taken from h before h is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.checks import Operands, accumulation_dtype, split_width
from mc_kernels.language import tl, triton
from mc_kernels.launch import clamped, launch
from mc_kernels.rows import load_row, norm_modulate, store_row, wide

FP8_MAX = 448.0  # the largest e4m3 value
ENOUGH_PROGRAMS = 512  # about four for each of an H100's or H200's 132 multiprocessors


def canvas_inject_reference(
    x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `canvas_inject`."""
    compute = accumulation_dtype(x)
    resized = F.interpolate(canvas.to(compute).permute(0, 4, 1, 2, 3), size=x.shape[1:4], mode="trilinear", align_corners=False)
    h = x.to(compute) + resized.permute(0, 2, 3, 4, 1)
    shift, scale = (tensor.to(compute)[:, :, None, None] for tensor in (shift, scale))
    u = F.layer_norm(h, h.shape[-1:], eps=eps) * (1 + scale) + shift
    return h.to(x.dtype).contiguous(), u.to(x.dtype).contiguous()


def canvas_inject_fp8_reference(
    x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """As `canvas_inject_reference`, with u as e4m3 codes and a float32 scale for each row."""
    compute = accumulation_dtype(x)
    h, _ = canvas_inject_reference(x, canvas, shift, scale, eps)
    x, canvas, shift, scale = (tensor.to(compute) for tensor in (x, canvas, shift, scale))
    _, u = canvas_inject_reference(x, canvas, shift, scale, eps)
    row_scale = u.abs().amax(dim=-1).clamp_min(1e-12) / FP8_MAX
    codes = (u / row_scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return h, codes, row_scale.float()


@triton.jit
def source_cell(index, cells, latents, LERP: tl.constexpr):
    """Lower cell, upper cell and the upper one's weight. Without LERP there are as many cells as latents, or only one."""
    if LERP:
        centre = tl.maximum((index + 0.5) * (cells * 1.0 / latents) - 0.5, 0.0)
        lower = tl.minimum(tl.floor(centre).to(tl.int32), cells - 1)
        return lower, tl.minimum(lower + 1, cells - 1), centre - lower
    else:
        return index % cells, index % cells, 0.0


@triton.jit
def canvas_cell(corners, offset, t_weight, h_weight, columns, mask, LERP_T: tl.constexpr, LERP_H: tl.constexpr):
    """The canvas at one cell of w from the rows at (t, h), (t, h + 1), (t + 1, h), (t + 1, h + 1): one, two or four loads."""
    value = load_row(corners[0] + offset, columns, mask)
    if LERP_H:
        value += h_weight * (load_row(corners[1] + offset, columns, mask) - value)
    if LERP_T:
        later = load_row(corners[2] + offset, columns, mask)
        if LERP_H:
            later += h_weight * (load_row(corners[3] + offset, columns, mask) - later)
        value += t_weight * (later - value)
    return value


@triton.jit
def canvas_inject_kernel(
    x_ptr, canvas_ptr, shift_ptr, scale_ptr, h_ptr, u_ptr, row_scale_ptr,
    T, H, W, t, h, w, D, eps, segments, columns_per_program,
    stride: tl.int64, shift_stride_b: tl.int64, shift_stride_t: tl.int64, scale_stride_b: tl.int64, scale_stride_t: tl.int64,
    HEAD: tl.constexpr, TAIL: tl.constexpr, LERP_T: tl.constexpr, LERP_H: tl.constexpr, LERP_W: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """One program: up to `columns_per_program` cells of one row of one frame. `stride` is D, in 64 bits."""
    program = tl.program_id(0)
    row = program // segments  # of the folded [B, T, H]
    first = program % segments * columns_per_program
    last = tl.minimum(first + columns_per_program, W)
    y = row % H
    frame = row // H % T
    b = wide(row // H // T)

    a = tl.arange(0, HEAD)
    z = HEAD + tl.arange(0, TAIL)
    mask_a = a < D
    mask_z = z < D
    shift_ptr += b * shift_stride_b + frame * shift_stride_t
    scale_ptr += b * scale_stride_b + frame * scale_stride_t
    shift_a = load_row(shift_ptr, a, mask_a)
    shift_z = load_row(shift_ptr, z, mask_z)
    scale_a = load_row(scale_ptr, a, mask_a)
    scale_z = load_row(scale_ptr, z, mask_z)

    t0, t1, t_weight = source_cell(frame, t, T, LERP_T)
    h0, h1, h_weight = source_cell(y, h, H, LERP_H)
    row_stride = stride * w
    corners = (
        canvas_ptr + ((b * t + t0) * h + h0) * row_stride,
        canvas_ptr + ((b * t + t0) * h + h1) * row_stride,
        canvas_ptr + ((b * t + t1) * h + h0) * row_stride,
        canvas_ptr + ((b * t + t1) * h + h1) * row_stride,
    )
    left_a = tl.zeros([HEAD], tl.float32)
    left_z = tl.zeros([TAIL], tl.float32)
    right_a = left_a
    right_z = left_z
    held, _, _ = source_cell(first, w, W, LERP_W)
    held -= 2  # nothing is held yet: the first turn loads both cells

    cell = wide(row) * (stride * W) + first * stride
    x_ptr += cell
    h_ptr += cell
    u_ptr += cell
    row_scale_ptr += wide(row) * W + first
    for column in range(first, last):
        lower, upper, weight = source_cell(column, w, W, LERP_W)
        if LERP_W:
            if lower > held + 1:  # the start, or downsampling
                right_a = canvas_cell(corners, lower * stride, t_weight, h_weight, a, mask_a, LERP_T, LERP_H)
                right_z = canvas_cell(corners, lower * stride, t_weight, h_weight, z, mask_z, LERP_T, LERP_H)
            if lower > held:
                left_a = right_a
                left_z = right_z
                right_a = canvas_cell(corners, upper * stride, t_weight, h_weight, a, mask_a, LERP_T, LERP_H)
                right_z = canvas_cell(corners, upper * stride, t_weight, h_weight, z, mask_z, LERP_T, LERP_H)
                held = lower
            h_a = load_row(x_ptr, a, mask_a) + left_a + weight * (right_a - left_a)
            h_z = load_row(x_ptr, z, mask_z) + left_z + weight * (right_z - left_z)
        else:
            h_a = canvas_cell(corners, lower * stride, t_weight, h_weight, a, mask_a, LERP_T, LERP_H)
            h_z = canvas_cell(corners, lower * stride, t_weight, h_weight, z, mask_z, LERP_T, LERP_H)
            h_a += load_row(x_ptr, a, mask_a)
            h_z += load_row(x_ptr, z, mask_z)
        store_row(h_ptr, a, h_a, mask_a)
        store_row(h_ptr, z, h_z, mask_z)
        u_a, u_z = norm_modulate(h_a, h_z, mask_a, mask_z, shift_a, shift_z, scale_a, scale_z, D, eps)
        if FP8:
            largest = tl.maximum(
                tl.max(tl.where(mask_a, tl.abs(u_a), 0.0), axis=0), tl.max(tl.where(mask_z, tl.abs(u_z), 0.0), axis=0)
            )
            row_scale = tl.div_rn(tl.maximum(largest, 1e-12), 448.0)  # `/` is off by up to two in the last place on a GPU
            tl.store(row_scale_ptr, row_scale)
            u_a = tl.clamp(tl.div_rn(u_a, row_scale), -448.0, 448.0)
            u_z = tl.clamp(tl.div_rn(u_z, row_scale), -448.0, 448.0)
        store_row(u_ptr, a, u_a, mask_a)
        store_row(u_ptr, z, u_z, mask_z)
        x_ptr += stride
        h_ptr += stride
        u_ptr += stride
        row_scale_ptr += 1


def configuration(size: tuple[int, int, int], grid: tuple[int, int, int], width: int, fp8: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments for latents of `size` (T, H, W) and a canvas of `grid` (t, h, w).

    Along an axis whose sizes are symbolic it interpolates, which is right for equal sizes and for a single cell too.
    """
    head, tail = split_width(width)
    lerp_t, lerp_h, lerp_w = (
        isinstance(cells, torch.SymInt) or isinstance(latents, torch.SymInt) or cells not in (1, latents)
        for cells, latents in zip(grid, size, strict=True)
    )
    return {
        "HEAD": head, "TAIL": tail, "LERP_T": lerp_t, "LERP_H": lerp_h, "LERP_W": lerp_w, "FP8": fp8,
        "num_warps": 4 if width > 512 else 1,
    }  # fmt: skip


def columns_per_program(rows: int, width: int) -> int:
    """The longest walk, at most 16 cells, that still leaves every multiprocessor several programs."""
    return clamped(rows * width // ENOUGH_PROGRAMS, 1, 16)


def canvas_inject_triton(
    x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launches the kernel. Arguments as `canvas_inject`; the third result is the codes' scale, None without `fp8`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernel is not written for.
    """
    operands = Operands("canvas_inject", x.device)
    operands.add("x", x, ("B", "T", "H", "W", "D"))
    operands.add("canvas", canvas, ("B", "t", "h", "w", "D"))
    operands.add("shift", shift, ("B", "T", "D"), layout="rows")
    operands.add("scale", scale, ("B", "T", "D"), layout="rows")
    B, T, H, W, D = x.shape
    t, h, w = canvas.shape[1:4]
    if fp8 and x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        operands.require(capability >= (8, 9), f"e4m3 needs compute capability 8.9, here is {capability}; pass fp8=False")
    rows = B * T * H
    columns = columns_per_program(rows, W)
    segments = -(-W // columns)
    grid = (rows * segments,)
    operands.launchable(grid)
    h_out = torch.empty_like(x)
    u = torch.empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    row_scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if fp8 else None
    launch(
        canvas_inject_kernel, grid, x, canvas, shift, scale, h_out, u, h_out if row_scale is None else row_scale,
        T, H, W, t, h, w, D, eps, segments, columns,
        D, shift.stride(0), shift.stride(1), scale.stride(0), scale.stride(1),
        **configuration((T, H, W), (t, h, w), D, fp8),
    )  # fmt: skip
    return h_out, u, row_scale


@torch.library.custom_op("mc_kernels::canvas_inject", mutates_args=())
def canvas_inject(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """h and u of the module's formula; the kernel on CUDA tensors, the reference on others.

    Args:
        x: patch-embedded latents on their grid, ``[B, T, H, W, D]``.
        canvas: the plan ``[B, t, h, w, D]``.
        shift: ``[B, T, D]``, expanded or strided views welcome.
        scale: likewise.
        eps: of the norm.

    Returns:
        h and u, ``[B, T, H, W, D]``, in x's dtype.
    """
    if not x.is_cuda:
        return canvas_inject_reference(x, canvas, shift, scale, eps)
    h, u, _ = canvas_inject_triton(x, canvas, shift, scale, eps)
    return h, u


@canvas_inject.register_fake
def _(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("mc_kernels::canvas_inject_fp8", mutates_args=())
def canvas_inject_fp8(
    x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """As `canvas_inject`, with u as e4m3 codes ``[B, T, H, W, D]`` and their float32 scale ``[B, T, H, W]``."""
    if not x.is_cuda:
        return canvas_inject_fp8_reference(x, canvas, shift, scale, eps)
    h, codes, row_scale = canvas_inject_triton(x, canvas, shift, scale, eps, fp8=True)
    assert row_scale is not None
    return h, codes, row_scale


@canvas_inject_fp8.register_fake
def _(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return x.new_empty(x.shape), codes, x.new_empty(x.shape[:-1], dtype=torch.float32)
