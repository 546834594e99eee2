"""ReLU linear attention of SANA, head width 32.

    s = sum_n relu(k_n) v_n^T          [32, 32] for each sample and head
    z = sum_n relu(k_n)                [32]
    o_n = (relu(q_n) s) / max(relu(q_n) . z, 1e-15)

SANA (arXiv 2410.10629) divides by (relu(q) . z + 1e-15). The sum has no negative term, so the clamp gives the same bits
wherever it is not tiny, and survives graph optimisers that drop tiny constants. Sums are in float32, as in diffusers'
``SanaLinearAttnProcessor2_0``: tf32 holds 16-bit inputs exactly (ten mantissa bits), so their products take one tf32 product; s
and float32 inputs are wider, so theirs take three (tf32x3), which is float32 to within its last bits.

A video has thousands of samples times heads (attention never crosses frames): one program each makes s, then all of o. An image
has a hundred: its tokens are split, one launch writes partial sums of s and z, a second one adds them in a fixed order and
makes o, so a result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mc_kernels.checks import FLOATS, Operands, accumulation_dtype
from mc_kernels.language import tl, triton
from mc_kernels.launch import clamped, launch, shows_kernels
from mc_kernels.rows import wide

HEAD_WIDTH = 32
SMALLEST = 1e-15
ENOUGH_PROGRAMS = 512  # about four for each of an H100's or H200's 132 multiprocessors
SHORTEST_SPLIT = 128  # tokens; below, adding partial sums costs more than it spreads


def linear_attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `linear_attention`."""
    compute = accumulation_dtype(q)
    queries, keys, values = (tensor.to(compute).transpose(1, 2) for tensor in (q.relu(), k.relu(), v))
    sums = keys.transpose(2, 3) @ values
    denominator = queries @ keys.sum(dim=2)[..., None]
    attended = (queries @ sums) / denominator.clamp_min(SMALLEST)
    return attended.transpose(1, 2).to(q.dtype).contiguous()


@triton.jit
def load_tokens(pointer, tokens, columns, stride, end, RELU: tl.constexpr):
    """A block of tokens of one head `[BLOCK, 32]` in float32, zero from `end` on."""
    offsets = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    values = tl.load(pointer + offsets, mask=(tokens < end)[:, None], other=0.0).to(tl.float32)
    if RELU:
        values = tl.maximum(values, 0.0)
    return values


@triton.jit
def sum_keys_values(k_ptr, v_ptr, k_stride, v_stride, start, end, BLOCK: tl.constexpr, EXACT_IN_TF32: tl.constexpr):
    """s and z over the tokens from `start` to `end`."""
    columns = tl.arange(0, 32)
    s = tl.zeros([32, 32], tl.float32)
    z = tl.zeros([32], tl.float32)
    for block in range(start, end, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        keys = load_tokens(k_ptr, tokens, columns, k_stride, end, True)
        values = load_tokens(v_ptr, tokens, columns, v_stride, end, False)
        if EXACT_IN_TF32:
            s = tl.dot(tl.trans(keys), values, s, input_precision="tf32")
        else:
            s = tl.dot(tl.trans(keys), values, s, input_precision="tf32x3")
        z += tl.sum(keys, axis=0)
    return s, z


@triton.jit
def attend(q_ptr, o_ptr, q_stride, o_stride, s, z, start, end, BLOCK: tl.constexpr):
    """o for the tokens from `start` to `end`."""
    columns = tl.arange(0, 32)
    for block in range(start, end, BLOCK):
        tokens = block + tl.arange(0, BLOCK)
        queries = load_tokens(q_ptr, tokens, columns, q_stride, end, True)
        numerator = tl.dot(queries, s, input_precision="tf32x3")
        denominator = tl.maximum(tl.sum(queries * z[None, :], axis=1), 1e-15)
        attended = numerator / denominator[:, None]
        offsets = tokens.to(tl.int64)[:, None] * o_stride + columns[None, :]
        tl.store(o_ptr + offsets, attended.to(o_ptr.dtype.element_ty), mask=(tokens < end)[:, None])


@triton.jit
def one_pass_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, N, heads,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64, o_b: tl.int64, o_n: tl.int64,
    BLOCK: tl.constexpr, EXACT_IN_TF32: tl.constexpr,
):  # fmt: skip
    """One program: all tokens of one sample and head."""
    b = wide(tl.program_id(0) // heads)
    head = tl.program_id(0) % heads
    s, z = sum_keys_values(
        k_ptr + b * k_b + head * k_h, v_ptr + b * v_b + head * v_h, k_n, v_n, 0, N, BLOCK, EXACT_IN_TF32
    )  # fmt: skip
    attend(q_ptr + b * q_b + head * q_h, o_ptr + b * o_b + head * 32, q_n, o_n, s, z, 0, N, BLOCK)


@triton.jit
def partial_sums_kernel(
    k_ptr, v_ptr, partial_ptr, N, heads, splits, tokens_per_split,
    k_b: tl.int64, k_n: tl.int64, k_h: tl.int64, v_b: tl.int64, v_n: tl.int64, v_h: tl.int64,
    BLOCK: tl.constexpr, EXACT_IN_TF32: tl.constexpr,
):  # fmt: skip
    """One program: s and z over one split, into row 0 to 31 and row 32 of `partial` `[B, heads, splits, 33, 32]`."""
    program = tl.program_id(0)
    b = wide(program // splits // heads)
    head = program // splits % heads
    start = program % splits * tokens_per_split
    end = tl.minimum(start + tokens_per_split, N)
    s, z = sum_keys_values(
        k_ptr + b * k_b + head * k_h, v_ptr + b * v_b + head * v_h, k_n, v_n, start, end, BLOCK, EXACT_IN_TF32
    )  # fmt: skip
    columns = tl.arange(0, 32)
    partial_ptr += wide(program) * (33 * 32)
    tl.store(partial_ptr + columns[:, None] * 32 + columns[None, :], s)
    tl.store(partial_ptr + 32 * 32 + columns, z)


@triton.jit
def attend_split_kernel(
    q_ptr, partial_ptr, o_ptr, N, heads, splits, tokens_per_split,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, o_b: tl.int64, o_n: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the partial sums added up, then o for one split."""
    program = tl.program_id(0)
    row = program // splits
    b = wide(row // heads)
    head = row % heads
    start = program % splits * tokens_per_split
    end = tl.minimum(start + tokens_per_split, N)
    columns = tl.arange(0, 32)
    s = tl.zeros([32, 32], tl.float32)
    z = tl.zeros([32], tl.float32)
    partial_ptr += wide(row * splits) * (33 * 32)
    for _ in range(splits):
        s += tl.load(partial_ptr + columns[:, None] * 32 + columns[None, :])
        z += tl.load(partial_ptr + 32 * 32 + columns)
        partial_ptr += 33 * 32
    attend(q_ptr + b * q_b + head * q_h, o_ptr + b * o_b + head * 32, q_n, o_n, s, z, start, end, BLOCK)


def configuration(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments: tokens a turn, as many as leave a multiprocessor registers for several programs."""
    exact = dtype != torch.float32
    return {"BLOCK": 64 if exact else 32, "EXACT_IN_TF32": exact, "num_warps": 4}


def token_splits(rows: int, tokens: int) -> int:
    """Into how many parts the tokens of one of `rows` (samples times heads) are split; 1 where rows alone fill the GPU."""
    return clamped(-(-ENOUGH_PROGRAMS // rows), 1, clamped(tokens // SHORTEST_SPLIT, 1, tokens))


def linear_attention_triton(q: Tensor, k: Tensor, v: Tensor, *, splits: int | None = None) -> Tensor:
    """Launches one kernel, or two when tokens are split. Arguments as `linear_attention`; `splits` forces one way.

    Raises:
        ValueError: a shape, dtype, device or layout the kernels are not written for.
    """
    operands = Operands("linear_attention", q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        operands.add(name, tensor, ("B", "N", "heads", HEAD_WIDTH), (q.dtype,) if name != "q" else FLOATS, layout="rows")
    B, N, heads, _ = q.shape
    if splits is None:
        splits = token_splits(B * heads, N)
    else:
        operands.require(1 <= splits <= N, f"splits is {splits}; pass a number from 1 to the {N} tokens")
    one_pass = isinstance(splits, int) and splits == 1  # what follows the sizes of a run may be more than one
    tokens_per_split = -(-N // splits)
    splits = -(-N // tokens_per_split)  # 63 tokens in 16 parts of 4 are 16 parts, in 20 parts of 4 also 16
    grid = (B * heads * splits,)
    operands.launchable(grid)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    options = configuration(q.dtype)
    if one_pass:
        launch(
            one_pass_kernel, grid, q, k, v, o, N, heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:2],
            **options,
        )  # fmt: skip
        return o
    partial = torch.empty(B, heads, splits, HEAD_WIDTH + 1, HEAD_WIDTH, dtype=torch.float32, device=q.device)
    launch(
        partial_sums_kernel,
        grid,
        k,
        v,
        partial,
        N,
        heads,
        splits,
        tokens_per_split,
        *k.stride()[:3],
        *v.stride()[:3],
        **options,
    )
    del options["EXACT_IN_TF32"]
    launch(
        attend_split_kernel,
        grid,
        q,
        partial,
        o,
        N,
        heads,
        splits,
        tokens_per_split,
        *q.stride()[:3],
        *o.stride()[:2],
        **options,
    )
    return o


@torch.library.custom_op("mc_kernels::linear_attention", mutates_args=())
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o of the module's formula; the kernels on CUDA tensors, the reference on others.

    Args:
        q: queries before the ReLU, ``[B, N, heads, 32]``; views of a merged projection welcome.
        k: keys before the ReLU, likewise.
        v: values, likewise.

    Returns:
        ``[B, N, heads, 32]``, contiguous, in q's dtype.
    """
    if not q.is_cuda:
        return linear_attention_reference(q, k, v)
    return linear_attention_triton(q, k, v)


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


shows_kernels(linear_attention, linear_attention_triton)
