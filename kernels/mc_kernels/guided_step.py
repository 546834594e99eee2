"""Guidance and the sampler's update in one pass over the latents.

    v      = sum_g w_g p_g                                       branches g: prompt, negative, ...
    x_next = sum_j a_j x_j + sum_j b_j v_j                       j = 0 is now, j = 1 the step before, up to order - 1

Classifier-free guidance of scale s is w = (s, 1 - s), of a clip possibly with a scale for each frame. Every deterministic
sampler that is served is linear in the samples and predictions, so a step is its row of coefficients ``[input_scale, a_0..,
b_0..]``; the input scale belongs to the model's input and is not used here. All scalars are per sample: requests at different
steps share a batch. Everything is read once and written once, in float32 whatever the predictions' type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mc_kernels.checks import Operands, accumulation_dtype, describe
from mc_kernels.language import tl, triton
from mc_kernels.launch import launch, shows_kernels
from mc_kernels.rows import wide

MAX_ORDER = 4


def sampler_order(coefficients: Tensor) -> int:
    """How many samples, and as many predictions, the next sample is made of."""
    return (coefficients.shape[1] - 1) // 2


def guided_step_reference(
    predictions: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `guided_step`."""
    compute = accumulation_dtype(sample)
    order = sampler_order(coefficients)
    ones = (1,) * (sample.ndim - 1)
    if guidance.ndim == 3:
        weights = guidance.to(compute)[:, :, None, :, None, None]
    else:
        weights = guidance.to(compute).reshape(*guidance.shape, *ones)
    guided = (predictions.to(compute) * weights).sum(dim=1, keepdim=True)
    past = sample.new_empty(sample.shape[0], 0, *sample.shape[1:]) if history is None else history
    samples = torch.cat([sample[:, None], past[:, : order - 1]], dim=1).to(compute)
    predicted = torch.cat([guided, past[:, order - 1 :].to(compute)], dim=1)
    terms = torch.cat([samples, predicted], dim=1)
    stepped = (coefficients[:, 1:].to(compute).reshape(len(sample), 2 * order, *ones) * terms).sum(dim=1)
    remembered = torch.cat([samples[:, :-1], predicted[:, :-1]], dim=1)
    return stepped.to(sample.dtype).contiguous(), remembered.to(sample.dtype).contiguous()


@triton.jit
def guided_step_kernel(
    p_ptr, guidance_ptr, coefficients_ptr, x_ptr, history_ptr, next_ptr, next_history_ptr,
    E, blocks, branches, frames, cells, stride: tl.int64,
    ORDER: tl.constexpr, PER_FRAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK` of the `E` elements of one sample. `stride` is E, in 64 bits; a frame has `cells` of a channel."""
    b = wide(tl.program_id(0) // blocks)
    offsets = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < E
    kind = next_ptr.dtype.element_ty
    past = ORDER - 1  # how many samples, and as many predictions, are remembered
    guidance_ptr += b * branches * frames
    coefficients_ptr += b * (1 + 2 * ORDER)
    p_ptr += b * branches * stride + offsets
    history_ptr += b * 2 * past * stride + offsets
    next_history_ptr += b * 2 * past * stride + offsets

    guided = tl.zeros([BLOCK], tl.float32)
    for _ in range(branches):
        prediction = tl.load(p_ptr, mask=mask, other=0.0).to(tl.float32)
        if PER_FRAME:
            guided += tl.load(guidance_ptr + offsets // cells % frames, mask=mask, other=0.0) * prediction
        else:
            guided += tl.load(guidance_ptr) * prediction
        p_ptr += stride
        guidance_ptr += frames
    x = tl.load(x_ptr + b * stride + offsets, mask=mask, other=0.0).to(tl.float32)
    stepped = tl.load(coefficients_ptr + 1) * x + tl.load(coefficients_ptr + 1 + ORDER) * guided
    for j in tl.static_range(1, ORDER):
        old_x = tl.load(history_ptr + (j - 1) * stride, mask=mask, other=0.0).to(tl.float32)
        old_v = tl.load(history_ptr + (past + j - 1) * stride, mask=mask, other=0.0).to(tl.float32)
        stepped += tl.load(coefficients_ptr + 1 + j) * old_x + tl.load(coefficients_ptr + 1 + ORDER + j) * old_v
        if j < past:
            tl.store(next_history_ptr + j * stride, old_x.to(kind), mask=mask)
            tl.store(next_history_ptr + (past + j) * stride, old_v.to(kind), mask=mask)
    if ORDER > 1:
        tl.store(next_history_ptr, x.to(kind), mask=mask)
        tl.store(next_history_ptr + past * stride, guided.to(kind), mask=mask)
    tl.store(next_ptr + b * stride + offsets, stepped.to(kind), mask=mask)


def configuration(order: int, per_frame: bool) -> dict[str, Any]:
    """The kernel's compile-time arguments: eight elements a thread, so that 16-bit predictions load 128 bits at a time."""
    return {"ORDER": order, "PER_FRAME": per_frame, "BLOCK": 1024, "num_warps": 4}


def guided_step_triton(
    predictions: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel. Arguments as `guided_step`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernel is not written for.
    """
    operands = Operands("guided_step", sample.device)
    latent = tuple(f"latent {axis}" for axis in range(sample.ndim - 1))
    operands.add("sample", sample, ("B", *latent))
    operands.add("predictions", predictions, ("B", "G", *latent))
    per_frame = guidance.ndim == 3
    operands.require(
        not per_frame or sample.ndim == 5, f"guidance has a weight for each frame and sample is {describe(sample)}; pass a clip"
    )
    operands.add("guidance", guidance, ("B", "G", "latent 1") if per_frame else ("B", "G"), (torch.float32,))
    order = sampler_order(coefficients)
    operands.add("coefficients", coefficients, ("B", 1 + 2 * order), (torch.float32,))
    past = 2 * (order - 1)
    operands.require(1 <= order <= MAX_ORDER, f"the coefficients are of order {order}; pass 1 to {MAX_ORDER}")
    operands.require((history is not None) == (past > 0), f"order {order} needs {past} remembered tensors; pass such a history")
    if history is not None:
        operands.add("history", history, ("B", past, *latent), (sample.dtype,))
    elements = sample[0].numel()
    frames, cells = (sample.shape[2], sample.shape[3] * sample.shape[4]) if per_frame else (1, 1)
    options = configuration(order, per_frame)
    blocks = -(-elements // options["BLOCK"])
    grid = (sample.shape[0] * blocks,)
    operands.launchable(grid)
    next_sample = torch.empty_like(sample)
    next_history = torch.empty((sample.shape[0], past, *sample.shape[1:]), dtype=sample.dtype, device=sample.device)
    # Without a history its pointers are neither read nor written.
    launch(
        guided_step_kernel, grid, predictions, guidance, coefficients, sample, sample if history is None else history,
        next_sample, sample if history is None else next_history, elements, blocks, guidance.shape[1], frames, cells, elements,
        **options,
    )  # fmt: skip
    return next_sample, next_history


@torch.library.custom_op("mc_kernels::guided_step", mutates_args=())
def guided_step(
    predictions: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x_next and the history that the following step takes; the kernel on CUDA tensors, the reference on others.

    Args:
        predictions: the model's outputs ``[B, G, ...]``, branch by branch.
        guidance: float32 weights of the branches, ``[B, G]``; one a frame, ``[B, G, T]``, for clips ``[B, C, T, H, W]``.
        coefficients: float32 ``[B, 1 + 2 order]``.
        sample: ``[B, ...]``: ``[B, C, H, W]`` or ``[B, C, T, H, W]``.
        history: ``[B, K, ...]`` in the sample's dtype, K = 2 (order - 1): previous samples, newest first, then previous
            predictions, newest first. None for order 1.

    Returns:
        The next sample, and the next history ``[B, K, ...]`` (no elements for order 1).
    """
    if not sample.is_cuda:
        return guided_step_reference(predictions, guidance, coefficients, sample, history)
    return guided_step_triton(predictions, guidance, coefficients, sample, history)


@guided_step.register_fake
def _(
    predictions: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    past = 2 * (sampler_order(coefficients) - 1)
    return sample.new_empty(sample.shape), sample.new_empty((sample.shape[0], past, *sample.shape[1:]))


shows_kernels(guided_step, guided_step_triton)
