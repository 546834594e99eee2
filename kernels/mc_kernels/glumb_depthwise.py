"""The middle of SANA's Mix-FFN (GLUMBConv), between its two 1 x 1 convolutions, channels last.

    s = silu(p)                                         p [B, H, W, 2C], the first convolution's output
    d = depthwise 3 x 3 convolution of s + bias         zero outside the image
    o = d[..., :C] * silu(d[..., C:])                   [B, H, W, C]

Source: SANA (arXiv 2410.10629), its Mix-FFN; ``GLUMBConv.forward``. One read of p, one write of o. Nine exact SiLUs for each
element, one for each tap, would cost several times what the memory does, so SiLU is applied once to whatever is loaded: a
program owns a strip four columns wide and walks down its rows, and every loaded row is multiplied into the three output rows it
touches, of which two wait in registers. Two SiLUs share one reciprocal. A strip also loads its neighbours' edge columns, six in
all, so over all programs half of the elements meet SiLU twice.

The weights are float32 ``[9, 2C]``, tap by tap (`taps_from_conv`): each is a contiguous vector over the channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.checks import Operands, accumulation_dtype, next_power_of_two
from mc_kernels.language import tl, triton
from mc_kernels.launch import clamped, launch, shows_kernels
from mc_kernels.rows import wide

STRIP = 4  # output columns of a program
SHORTEST_WALK = 8  # rows
ENOUGH_PROGRAMS = 1024  # two rounds of what an H100 or H200 holds at a time, so that the last round is not mostly idle


def taps_from_conv(weight: Tensor) -> Tensor:
    """A depthwise ``Conv2d``'s weight ``[2C, 1, 3, 3]`` as float32 taps ``[9, 2C]``, row by row."""
    return weight.flatten(1).t().float().contiguous()


def glumb_depthwise_reference(p: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `glumb_depthwise`."""
    compute = accumulation_dtype(p)
    kernel = taps.to(compute).t().reshape(-1, 1, 3, 3)
    image = F.silu(p.to(compute)).permute(0, 3, 1, 2)
    convolved = F.conv2d(image, kernel, bias.to(compute), padding=1, groups=image.shape[1])
    value, gate = convolved.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return (value * F.silu(gate)).to(p.dtype).contiguous()


@triton.jit
def silu_pair(x, y):
    """silu of two values with one reciprocal: 1 / (a b) times b is 1 / a. The clamp keeps a b finite; beyond, silu is 0."""
    a = 1.0 + tl.exp2(tl.minimum(x * -1.4426950408889634, 60.0))
    b = 1.0 + tl.exp2(tl.minimum(y * -1.4426950408889634, 60.0))
    inverse = 1.0 / (a * b)
    return x * b * inverse, y * a * inverse


@triton.jit
def load_cell(pointer, inside, mask):
    return tl.load(pointer, mask=mask & inside, other=0.0).to(tl.float32)


@triton.jit
def silu_row(pointer, column, W, cell_stride, row_inside, mask):
    """SiLU of the six cells that start one left of `column`, as a tuple; zero outside the image."""
    c0 = load_cell(pointer, row_inside & (column > 0), mask)
    c1 = load_cell(pointer + cell_stride, row_inside, mask)
    c2 = load_cell(pointer + 2 * cell_stride, row_inside & (column + 1 < W), mask)
    c3 = load_cell(pointer + 3 * cell_stride, row_inside & (column + 2 < W), mask)
    c4 = load_cell(pointer + 4 * cell_stride, row_inside & (column + 3 < W), mask)
    c5 = load_cell(pointer + 5 * cell_stride, row_inside & (column + 4 < W), mask)
    c0, c1 = silu_pair(c0, c1)
    c2, c3 = silu_pair(c2, c3)
    c4, c5 = silu_pair(c4, c5)
    return c0, c1, c2, c3, c4, c5


@triton.jit
def load_tap(pointer, tap, channel_stride, channels, mask):
    return tl.load(pointer + tap * 2 * channel_stride + channels, mask=mask, other=0.0)


@triton.jit
def load_taps(pointer, stride, channels, mask):
    """The nine weights of each channel of one half, as a tuple."""
    return (
        load_tap(pointer, 0, stride, channels, mask),
        load_tap(pointer, 1, stride, channels, mask),
        load_tap(pointer, 2, stride, channels, mask),
        load_tap(pointer, 3, stride, channels, mask),
        load_tap(pointer, 4, stride, channels, mask),
        load_tap(pointer, 5, stride, channels, mask),
        load_tap(pointer, 6, stride, channels, mask),
        load_tap(pointer, 7, stride, channels, mask),
        load_tap(pointer, 8, stride, channels, mask),
    )


@triton.jit
def add_row(sums, cells, left, middle, right):
    """Four sums with one row of taps added: sum i sees cells i, i + 1 and i + 2."""
    return (
        sums[0] + cells[0] * left + cells[1] * middle + cells[2] * right,
        sums[1] + cells[1] * left + cells[2] * middle + cells[3] * right,
        sums[2] + cells[2] * left + cells[3] * middle + cells[4] * right,
        sums[3] + cells[3] * left + cells[4] * middle + cells[5] * right,
    )


@triton.jit
def glumb_depthwise_kernel(
    p_ptr, taps_ptr, bias_ptr, o_ptr, H, W, C, strips, bands, rows_per_program, channel_stride: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: `BLOCK` channels of both halves, four columns, up to `rows_per_program` rows. `channel_stride` is C."""
    program = tl.program_id(0)
    b = wide(program // bands // strips)
    column = program // bands % strips * 4
    first = program % bands * rows_per_program
    last = tl.minimum(first + rows_per_program, H)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < C

    value_taps = load_taps(taps_ptr, channel_stride, channels, mask)
    gate_taps = load_taps(taps_ptr + channel_stride, channel_stride, channels, mask)
    value_bias = tl.load(bias_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias_ptr + channel_stride + channels, mask=mask, other=0.0).to(tl.float32)

    cell_stride = 2 * channel_stride
    row_stride = cell_stride * W
    p_ptr += (b * H + first - 1) * row_stride + (column - 1) * cell_stride + channels
    o_ptr += ((b * H + first - 1) * channel_stride) * W + column * channel_stride + channels
    value_next = (value_bias, value_bias, value_bias, value_bias)  # output row `row + 1`: nothing added yet
    gate_next = (gate_bias, gate_bias, gate_bias, gate_bias)
    value_here = value_next  # output row `row`: the tap above added
    gate_here = gate_next
    for row in range(first - 1, last + 1):
        inside = (row >= 0) & (row < H)
        value_cells = silu_row(p_ptr, column, W, cell_stride, inside, mask)
        gate_cells = silu_row(p_ptr + channel_stride, column, W, cell_stride, inside, mask)
        value_done = add_row(value_here, value_cells, value_taps[6], value_taps[7], value_taps[8])
        gate_done = add_row(gate_here, gate_cells, gate_taps[6], gate_taps[7], gate_taps[8])
        value_here = add_row(value_next, value_cells, value_taps[3], value_taps[4], value_taps[5])
        gate_here = add_row(gate_next, gate_cells, gate_taps[3], gate_taps[4], gate_taps[5])
        value_next = add_row(
            (value_bias, value_bias, value_bias, value_bias), value_cells, value_taps[0], value_taps[1], value_taps[2]
        )  # fmt: skip
        gate_next = add_row((gate_bias, gate_bias, gate_bias, gate_bias), gate_cells, gate_taps[0], gate_taps[1], gate_taps[2])
        if row > first:
            g0, g1 = silu_pair(gate_done[0], gate_done[1])
            g2, g3 = silu_pair(gate_done[2], gate_done[3])
            done = o_ptr - W * channel_stride
            kind = o_ptr.dtype.element_ty
            tl.store(done, (value_done[0] * g0).to(kind), mask=mask)
            tl.store(done + channel_stride, (value_done[1] * g1).to(kind), mask=mask & (column + 1 < W))
            tl.store(done + 2 * channel_stride, (value_done[2] * g2).to(kind), mask=mask & (column + 2 < W))
            tl.store(done + 3 * channel_stride, (value_done[3] * g3).to(kind), mask=mask & (column + 3 < W))
        p_ptr += row_stride
        o_ptr += W * channel_stride


def configuration(channels: int) -> dict[str, Any]:
    """The kernel's compile-time arguments: two channels a thread, since what waits for its rows stays in registers."""
    return {"BLOCK": min(256, max(32, next_power_of_two(channels))), "num_warps": 4 if channels > 64 else 1}


def rows_per_program(others: int, height: int) -> int:
    """The longest walk that leaves every multiprocessor several programs; each walk reads two rows more than it writes."""
    bands = -(-ENOUGH_PROGRAMS // others)
    return clamped(-(-height // bands), SHORTEST_WALK, height)


def glumb_depthwise_triton(p: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """Launches the kernel. Arguments as `glumb_depthwise`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernel is not written for.
    """
    operands = Operands("glumb_depthwise", p.device)
    operands.add("p", p, ("B", "H", "W", "2C"))
    operands.add("taps", taps, (9, "2C"), (torch.float32,))
    operands.add("bias", bias, ("2C",))
    B, H, W, doubled = p.shape
    operands.require(doubled % 2 == 0, f"p has {doubled} channels; it needs a value and a gate of the same width")
    C = doubled // 2
    options = configuration(C)
    strips, blocks = -(-W // STRIP), -(-C // options["BLOCK"])
    rows = rows_per_program(B * strips * blocks, H)
    bands = -(-H // rows)
    grid = (B * strips * bands, blocks)
    operands.launchable(grid)
    o = torch.empty(B, H, W, C, dtype=p.dtype, device=p.device)
    launch(glumb_depthwise_kernel, grid, p, taps, bias, o, H, W, C, strips, bands, rows, C, **options)
    return o


@torch.library.custom_op("mc_kernels::glumb_depthwise", mutates_args=())
def glumb_depthwise(p: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """o of the module's formula; the kernel on CUDA tensors, the reference on others.

    Args:
        p: ``[B, H, W, 2C]``, values before gates, before SiLU.
        taps: float32 ``[9, 2C]``, from `taps_from_conv`.
        bias: ``[2C]``.

    Returns:
        ``[B, H, W, C]`` in p's dtype.
    """
    if not p.is_cuda:
        return glumb_depthwise_reference(p, taps, bias)
    return glumb_depthwise_triton(p, taps, bias)


@glumb_depthwise.register_fake
def _(p: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    return p.new_empty((*p.shape[:3], p.shape[3] // 2))


shows_kernels(glumb_depthwise, glumb_depthwise_triton)
