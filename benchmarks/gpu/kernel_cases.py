"""Every kernel at the shapes it serves: its inputs, and the same in plain PyTorch as a bfloat16 model computes it.

The shapes are those of `mc_kernels.aot.cases`, whose machine code docs/kernels.md describes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_export.model.interpolation import resize_grid
from mc_kernels.canvas_inject import FP8_MAX, canvas_inject, canvas_inject_fp8, canvas_inject_reference
from mc_kernels.canvas_injection_attention import canvas_injection_attention, canvas_injection_attention_reference
from mc_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_reference
from mc_kernels.glumb_depthwise import glumb_depthwise, glumb_depthwise_reference
from mc_kernels.guided_step import guided_step, guided_step_reference
from mc_kernels.linear_attention import linear_attention, linear_attention_reference
from mc_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, rotary_tables

BF16_ERROR = 2**-8  # relative L2: rounding a result once gives about half of it
E4M3_ERROR = 2**-4
ATTENTION_ERROR = 2**-6  # the merged product is rounded to bfloat16 before the attention reads it

Draw = Callable[..., Tensor]
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """One use of one operator.

    Attributes:
        operator, serves: its name and the model and size.
        inputs: arguments, from a function that draws bfloat16 tensors (or those of another `dtype`).
        operation: the operator.
        eager: the same as a bfloat16 model computes it.
        reference: in the precision of its arguments.
        tolerance: of the relative L2 of every output against `reference` in float64.
        memory_bound: whether it is asked for a share of the copy bandwidth.
    """

    operator: str
    serves: str
    inputs: Callable[[Draw], tuple[Any, ...]]
    operation: Callable[..., Any]
    eager: Callable[..., Any]
    reference: Callable[..., Any]
    tolerance: float = BF16_ERROR
    memory_bound: bool = True

    @property
    def name(self) -> str:
        """In the report."""
        return f"{self.operator}, {self.serves}"


def values_of(outputs: Any) -> list[Tensor]:
    """What is compared: e4m3 codes times their rows' scale, and no empty history."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if outputs[1:] and outputs[1].dtype == torch.float8_e4m3fn:
        outputs = [outputs[0], outputs[1].double() * outputs[2][..., None]]
    return [output for output in outputs if output.numel()]


def touched_bytes(tensors: Any) -> int:
    """The fewest bytes that reading (or writing) these takes: every element once, however often a view repeats it."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            count = 1
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                count *= size if stride else 1
            total += count * tensor.element_size()
    return total


def injected(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`CanvasConnector.residual` up to the attention: resize, add, norm, modulation."""
    h = x + resize_grid(canvas, (x.shape[1], x.shape[2], x.shape[3])).to(x.dtype)
    return h, F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def injected_fp8(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same and its quantisation."""
    h, u = injected(x, canvas, shift, scale)
    row_scale = u.float().abs().amax(dim=-1).clamp_min(1e-12) / FP8_MAX
    return h, (u / row_scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), row_scale


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU linear attention in float32 over padded values, as SANA's published processor brackets it."""
    query, key, value = (states.transpose(1, 2).float() for states in (F.relu(q), F.relu(k), v))
    sums = F.pad(value, (0, 1), value=1.0).transpose(-1, -2) @ key  # [B, heads, 33, 32]
    mixed = query @ sums.transpose(-1, -2)
    return (mixed[..., :-1] / (mixed[..., -1:] + 1e-15)).transpose(1, 2).to(q.dtype)


def injected_attended(x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Injection, projections, attention."""
    h, u = injected(x, canvas, shift, scale)
    q, k, v = F.linear(u, weight).flatten(0, 1).flatten(1, 2).unflatten(-1, (3, -1, 32)).unbind(2)
    return h, attended(q, k, v).reshape(x.shape)


def residual_normed(h: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The lines between two sublayers."""
    h = h + gate * y
    return h, F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated_depthwise(p: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The middle of `GLUMBConv`, in channels-last memory."""
    kernel = taps.t().reshape(-1, 1, 3, 3).to(p.dtype)
    mixed = F.conv2d(F.silu(p.permute(0, 3, 1, 2)), kernel, bias, padding=1, groups=p.shape[-1])
    value, gate = mixed.permute(0, 2, 3, 1).chunk(2, dim=-1)
    return value * F.silu(gate)


def stepped(p: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None) -> Any:
    """Guidance and update, as the step program writes them."""
    ones = (1,) * (sample.ndim - 1)
    v = (p.float() * guidance.reshape(*guidance.shape, *ones)).sum(dim=1)
    weights = coefficients[:, 1:].reshape(len(sample), -1, *ones)
    if history is None:
        return weights[:, 0] * sample + weights[:, 1] * v
    past = history.shape[1] // 2
    samples = torch.cat([sample[:, None], history[:, :past]], dim=1)
    predictions = torch.cat([v[:, None], history[:, past:]], dim=1)
    following = (weights * torch.cat([samples, predictions], dim=1)).sum(dim=1)
    return following, torch.cat([samples[:, :-1], predictions[:, :-1]], dim=1)


def normed_rotated(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RMS norm and rotary positions, rotated in float32 as diffusers does."""

    def turned(states: Tensor, weight: Tensor) -> Tensor:
        joined = states if len(weight) == states.shape[-1] else states.flatten(2)
        normed = F.rms_norm(joined, joined.shape[-1:], weight, 1e-6).reshape(states.shape)
        even, odd = normed.float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None], sin[:, None]
        return torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2).to(states.dtype)

    return turned(q, q_weight), turned(k, k_weight)


def cases(dry: bool) -> list[Case]:
    """All of them; in a dry run at odd tiny sizes."""
    sana, flux, wan = ((2, 1, 5, 7), (1, 1, 6, 5), (2, 3, 4, 5)) if dry else ((2, 1, 32, 32), (1, 1, 64, 64), (2, 31, 22, 40))
    canvases = ((1, 3, 3), (1, 3, 4), (2, 2, 3)) if dry else ((1, 16, 16), (1, 32, 32), (3, 11, 20))
    narrow, wide, hidden, heads, text = (64, 96, 48, 2, 3) if dry else (2240, 3072, 5600, 24, 512)
    tokens = sana[2] * sana[3]
    video = wan[1] * wan[2] * wan[3]

    def inject(size: tuple[int, ...], canvas: tuple[int, ...], width: int, attends: bool = False) -> Any:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            modulation = draw(size[0], size[1], 6, width)
            weight = (draw(3 * width, width, scale=width**-0.5),) if attends else ()
            grid = (draw(*size, width), draw(size[0], *canvas, width))
            return (*grid, modulation[:, :, 0], modulation[:, :, 1], *weight)

        return inputs

    def norm(batch: int, count: int, width: int, per_token: bool) -> Any:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            modulation = draw(batch, count if per_token else 1, 6, width)
            return (draw(batch, count, width), draw(batch, count, width), *(modulation[:, :, index] for index in (2, 3, 4)))

        return inputs

    def attend(batch: int, count: int, width: int) -> Any:
        return lambda draw: draw(batch, count, 3, width // 32, 32).unbind(2)

    def update(order: int) -> Any:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            latent = (32, *sana[2:])
            full = {"dtype": torch.float32}
            history = (draw(2, 2 * (order - 1), *latent, **full),) if order > 1 else ()
            sample = draw(2, *latent, **full)
            return (draw(2, 2, *latent), draw(2, 2, **full), draw(2, 1 + 2 * order, **full), sample, *history)

        return inputs

    def rope(count: int, over_heads: bool) -> Any:
        def inputs(draw: Draw) -> tuple[Any, ...]:
            q, k, _ = draw(1, count, 3, heads, 128).unbind(2)
            weights = (draw(heads * 128 if over_heads else 128) for _ in range(2))
            positions = torch.arange(count, device=q.device)
            grid = torch.stack([positions // 640, positions // 32 % 20, positions % 32], dim=1)
            return (q, k, *weights, *rotary_tables(grid, (16, 56, 56)))

        return inputs

    def glumb(draw: Draw) -> tuple[Any, ...]:
        return draw(*sana[:1], *sana[2:], 2 * hidden), draw(9, 2 * hidden, dtype=torch.float32, scale=0.3), draw(2 * hidden)

    injection = (canvas_inject, injected, canvas_inject_reference)
    normed = (gated_residual_norm, residual_normed, gated_residual_norm_reference)
    attention = (linear_attention, attended, linear_attention_reference)
    rotation = (qk_norm_rope, normed_rotated, qk_norm_rope_reference)
    step = (guided_step, stepped, guided_step_reference)
    both = (canvas_injection_attention, injected_attended, canvas_injection_attention_reference)
    wan_text = "Wan2.2 704 x 1280 x 121"
    return [
        Case("canvas_inject", "SANA 1024 px", inject(sana, canvases[0], narrow), *injection),
        Case("canvas_inject", "FLUX-Kontext 1024 px", inject(flux, canvases[1], wide), *injection),
        Case("canvas_inject", wan_text, inject(wan, canvases[2], wide), *injection),
        Case("canvas_inject_fp8", wan_text, inject(wan, canvases[2], wide),
             canvas_inject_fp8, injected_fp8, canvas_inject_reference, tolerance=E4M3_ERROR),
        Case("linear_attention", "SANA 1024 px", attend(2, tokens, narrow), *attention),
        Case("linear_attention", wan_text, attend(wan[0] * wan[1], wan[2] * wan[3], wide), *attention),
        Case("gated_residual_norm", "SANA 1024 px", norm(2, tokens, narrow, False), *normed),
        Case("gated_residual_norm", "Wan2.2, modulated token by token", norm(1, video, wide, True), *normed),
        Case("glumb_depthwise", "SANA 1024 px", glumb, glumb_depthwise, gated_depthwise, glumb_depthwise_reference),
        Case("guided_step", "SANA, order 1", update(1), *step, memory_bound=False),  # half a megabyte: a launch, no more
        Case("guided_step", "SANA, order 2", update(2), *step, memory_bound=False),
        Case("qk_norm_rope", "FLUX-Kontext, each head alone", rope(flux[2] * flux[3] + text, False), *rotation),
        Case("qk_norm_rope", "Wan2.2, over all heads", rope(video, True), *rotation),
        Case("canvas_injection_attention", "SANA 1024 px", inject(sana, canvases[0], narrow, attends=True), *both,
             tolerance=ATTENTION_ERROR, memory_bound=False),
    ]  # fmt: skip
