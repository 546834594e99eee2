"""The launches that are compiled ahead of time: every kernel at the shapes it serves in production, in bfloat16.

Tensors are of the meta device: the launchers check them and choose their configuration exactly as they would on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_kernels.canvas_inject import canvas_inject_triton
from mc_kernels.gated_residual_norm import gated_residual_norm_triton
from mc_kernels.glumb_depthwise import glumb_depthwise_triton
from mc_kernels.guided_step import guided_step_triton
from mc_kernels.launch import Launch, recorded
from mc_kernels.linear_attention import linear_attention_triton
from mc_kernels.qk_norm_rope import qk_norm_rope_triton

CAPABILITIES = (80, 89, 90, 120)
FIRST_WITH_FP8 = 89


@dataclass(frozen=True)
class Case:
    """One production use of one launcher.

    Args:
        name: what it serves.
        call: runs the launcher on meta tensors.
        first_capability: the oldest compute capability that has its types.
    """

    name: str
    call: Callable[[], object]
    first_capability: int = 80

    def launches(self) -> list[Launch]:
        """What the launcher starts, in order."""
        with recorded() as launches:
            self.call()
        return launches


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _fp32(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.float32)


def _inject(batch: int, size: tuple[int, int, int], grid: tuple[int, int, int], width: int, *, fp8: bool = False) -> object:
    modulation = _meta(batch, size[0], 6, width)
    return canvas_inject_triton(
        _meta(batch, *size, width), _meta(batch, *grid, width), modulation[:, :, 0], modulation[:, :, 1], fp8=fp8
    )


def _norm(batch: int, tokens: int, width: int) -> object:
    modulation = _meta(batch, 1, 6, width)
    h = _meta(batch, tokens, width)
    return gated_residual_norm_triton(h, h, modulation[:, :, 2], modulation[:, :, 3], modulation[:, :, 4])


def _attention(batch: int, tokens: int, heads: int) -> object:
    return linear_attention_triton(*_meta(batch, tokens, 3, heads, 32).unbind(2))


def _norm_rope(tokens: int, heads: int, *, over_heads: bool) -> object:
    q, k, _ = _meta(1, tokens, 3, heads, 128).unbind(2)
    weight, table = _meta(heads * 128 if over_heads else 128), _fp32(tokens, 64)
    return qk_norm_rope_triton(q, k, weight, weight, table, table)


def _guided_step(order: int, latent: tuple[int, ...] = (32, 32, 32), *, per_frame: bool = False) -> object:
    history = _fp32(2, 2 * (order - 1), *latent) if order > 1 else None
    guidance = _fp32(2, 2, latent[1]) if per_frame else _fp32(2, 2)
    return guided_step_triton(_meta(2, 2, *latent), guidance, _fp32(2, 1 + 2 * order), _fp32(2, *latent), history)


CASES = (
    Case("SANA, 1024 px", lambda: _inject(2, (1, 32, 32), (1, 16, 16), 2240)),
    Case("FLUX-Kontext, 1024 px", lambda: _inject(1, (1, 64, 64), (1, 32, 32), 3072)),
    Case("Wan2.2, 704 x 1280 x 121", lambda: _inject(2, (31, 22, 40), (3, 11, 20), 3072)),
    Case("Wan2.2, e4m3 codes", lambda: _inject(2, (31, 22, 40), (3, 11, 20), 3072, fp8=True), FIRST_WITH_FP8),
    Case("SANA, 1024 px", lambda: _attention(2, 1024, 70)),
    Case("Wan2.2, 704 x 1280 x 121", lambda: _attention(2 * 31, 22 * 40, 96)),
    Case("SANA, 1024 px", lambda: _norm(2, 1024, 2240)),
    Case("FLUX-Kontext, 1024 px", lambda: _norm(1, 2 * 4096 + 512, 3072)),
    Case("Wan2.2, a timestep for each frame", lambda: _norm(2 * 31, 22 * 40, 3072)),
    Case("SANA, 1024 px", lambda: glumb_depthwise_triton(_meta(2, 32, 32, 11200), _fp32(9, 11200), _meta(11200))),
    Case("SANA, two branches, order 1", lambda: _guided_step(1)),
    Case("SANA, two branches, order 2", lambda: _guided_step(2)),
    Case("Wan2.2, two branches, order 2", lambda: _guided_step(2, (48, 31, 44, 80))),
    Case("SVD, a weight for each frame", lambda: _guided_step(1, (4, 25, 72, 128), per_frame=True)),
    Case("FLUX-Kontext, each head alone", lambda: _norm_rope(2 * 4096 + 512, 24, over_heads=False)),
    Case("Wan2.2, over all heads", lambda: _norm_rope(31 * 22 * 40, 24, over_heads=True)),
)
