"""Fused canvas-token injection attention: the canvas enters and is attended to, as one operator.

    h, u    = canvas_inject(x, canvas, shift, scale)
    q, k, v = u W^T + b                                 one product for the merged projection
    o       = linear_attention(q, k, v)                 within a frame: batch and frames fold together

Source: MetaCanvas (arXiv 2512.11464), section 3.4 and Algorithm 1: the first half of the connector's per-step SANA block, up to
the output projection. Two kernels of this package around one matrix product: u is read by the product and nothing else, and q,
k and v are views of its result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.canvas_inject import canvas_inject_reference, canvas_inject_triton
from mc_kernels.checks import accumulation_dtype
from mc_kernels.launch import shows_kernels
from mc_kernels.linear_attention import HEAD_WIDTH, linear_attention_reference, linear_attention_triton


def merged_projection(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Weights ``[D, D]`` (or biases ``[D]``) of three projections as the one ``[3D, D]`` (``[3D]``) that the operator takes."""
    return torch.cat([query, key, value])


def _heads(projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, T, H, W, 3D]`` to three views ``[B * T, H * W, heads, 32]``."""
    q, k, v = projected.flatten(0, 1).flatten(1, 2).unflatten(-1, (3, -1, HEAD_WIDTH)).unbind(2)
    return q, k, v


def canvas_injection_attention_reference(
    x: Tensor,
    canvas: Tensor,
    shift: Tensor,
    scale: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The formula in PyTorch, in float32 or, for float64 tensors, in float64. Arguments as `canvas_injection_attention`."""
    compute = accumulation_dtype(x)
    stored = x.dtype
    x, canvas, shift, scale = (tensor.to(compute) for tensor in (x, canvas, shift, scale))
    h, u = canvas_inject_reference(x, canvas, shift, scale, eps)
    projected = F.linear(u, qkv_weight.to(compute), None if qkv_bias is None else qkv_bias.to(compute))
    attended = linear_attention_reference(*_heads(projected))
    return h.to(stored), attended.reshape(x.shape).to(stored)


def canvas_injection_attention_triton(
    x: Tensor,
    canvas: Tensor,
    shift: Tensor,
    scale: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Launches the kernels. Arguments as `canvas_injection_attention`.

    Raises:
        ValueError: a shape, dtype, device or layout the kernels are not written for.
    """
    width = x.shape[-1]
    if width % HEAD_WIDTH or qkv_weight.shape != (3 * width, width):
        raise ValueError(
            f"canvas_injection_attention: x is {width} wide and qkv_weight {list(qkv_weight.shape)}; pass a multiple of "
            f"{HEAD_WIDTH} and the [{3 * width}, {width}] of merged_projection(query, key, value)"
        )
    h, u, _ = canvas_inject_triton(x, canvas, shift, scale, eps)
    attended = linear_attention_triton(*_heads(F.linear(u, qkv_weight, qkv_bias)))
    return h, attended.reshape(x.shape)


@torch.library.custom_op("mc_kernels::canvas_injection_attention", mutates_args=())
def canvas_injection_attention(
    x: Tensor,
    canvas: Tensor,
    shift: Tensor,
    scale: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h and o of the module's formula; the kernels on CUDA tensors, the reference on others.

    Args:
        x: patch-embedded latents on their grid, ``[B, T, H, W, D]``, D a multiple of 32.
        canvas: the plan ``[B, t, h, w, D]``.
        shift: ``[B, T, D]``, expanded or strided views welcome.
        scale: likewise.
        qkv_weight: ``[3D, D]``, from `merged_projection`.
        qkv_bias: ``[3D]`` or None.
        eps: of the norm.

    Returns:
        h and o, ``[B, T, H, W, D]``, in x's dtype; o is before the attention's output projection.
    """
    if not x.is_cuda:
        return canvas_injection_attention_reference(x, canvas, shift, scale, qkv_weight, qkv_bias, eps)
    return canvas_injection_attention_triton(x, canvas, shift, scale, qkv_weight, qkv_bias, eps)


@canvas_injection_attention.register_fake
def _(
    x: Tensor,
    canvas: Tensor,
    shift: Tensor,
    scale: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


shows_kernels(canvas_injection_attention, canvas_injection_attention_triton)
