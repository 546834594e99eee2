"""The planner: Qwen2.5-VL reads the instruction, then draws on the canvas tokens behind it (paper, sections 3.1 to 3.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel

from mc_export.model.interpolation import resize_grid
from mc_export.model.lora import CanvasRows


class PlannerStates(NamedTuple):
    """Last hidden states: ``context`` ``[B, L, D]`` at the instruction's rows, ``canvas`` ``[B, t, h, w, D]``."""

    context: Tensor
    canvas: Tensor


class CanvasTokens(nn.Module):
    """Learnable input embeddings on a grid ``(t, h, w)``; interpolated linearly where a request asks for another grid."""

    def __init__(self, grid: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(*grid, dim) * 0.02)

    def forward(self, size: tuple[int, int, int]) -> Tensor:
        """The embeddings ``[t, h, w, D]`` of a canvas of ``size``."""
        return resize_grid(self.tokens, size)


class Planner(nn.Module):
    """Qwen2.5-VL with a canvas behind its instruction, in one causal pass.

    The rows are ``[instruction, right-padded to L | canvas]``. Attention is causal by row and padding is never attended, so the
    instruction's rows do not see the canvas; a LoRA (see :mod:`mc_export.model.lora`) acts on the canvas rows alone.

    Args:
        qwen: transformers' model, without a language-model head.
        canvas_tokens: the learnable tokens.
        rows: shared with the LoRA layers, if the planner has any.
    """

    def __init__(self, qwen: Qwen2_5_VLModel, canvas_tokens: CanvasTokens, rows: CanvasRows | None = None) -> None:
        super().__init__()
        self.qwen = qwen
        self.canvas_tokens = canvas_tokens
        self.rows = rows or CanvasRows()

    def see(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """The embeddings ``[n, D]`` of pictures or clips by transformers' own vision tower.

        Args:
            patches: the processor's ``pixel_values``, ``[N, C * frames * patch * patch]``.
            grid_thw: patches of each along time, height and width, ``[pictures, 3]``.
        """
        embeddings: Tensor = self.qwen.visual(patches, grid_thw=grid_thw).pooler_output
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        canvas_position_ids: Tensor,
        vision: Tensor | None = None,
        vision_index: Tensor | None = None,
    ) -> PlannerStates:
        """Reads and draws.

        Args:
            input_ids: ``[B, L]``, right padded.
            attention_mask: ``[B, L]``, 1 at real tokens.
            position_ids: multimodal (t, h, w) positions of the instruction, ``[3, B, L]``.
            canvas_position_ids: positions of the canvas, ``[3, B, t, h, w]``; their shape asks for the grid.
            vision: embeddings of pictures and clips, ``[n, D]``; see :meth:`see`.
            vision_index: ``[B, L]``, the row of ``vision`` that stands at a token, negative at text.
        """
        batch, length = input_ids.shape
        t, h, w = canvas_position_ids.shape[2:]
        embeddings = self.qwen.language_model.embed_tokens(input_ids)
        if vision is not None and vision_index is not None:
            seen = vision[vision_index.clamp(min=0)].to(embeddings.dtype)
            embeddings = torch.where((vision_index >= 0)[..., None], seen, embeddings)
        canvas = self.canvas_tokens((t, h, w)).flatten(0, 2).to(embeddings.dtype)
        self.rows.start = length
        states = self.qwen.language_model(
            inputs_embeds=torch.cat([embeddings, canvas[None].expand(batch, -1, -1)], dim=1),
            attention_mask={"full_attention": causal_mask(attention_mask, t * h * w)},
            position_ids=torch.cat([position_ids, canvas_position_ids.flatten(2)], dim=2),
            use_cache=False,
        ).last_hidden_state
        return PlannerStates(states[:, :length], states[:, length:].unflatten(1, (t, h, w)))


def causal_mask(attention_mask: Tensor, canvas_rows: int) -> Tensor:
    """``[B, 1, S, S]`` with ``S = L + canvas_rows``, True where a row (dim 2) may attend to a row (dim 3)."""
    batch, length = attention_mask.shape
    total = length + canvas_rows
    order = torch.arange(total, device=attention_mask.device)
    keys = torch.cat([attention_mask != 0, attention_mask.new_ones(batch, canvas_rows) != 0], dim=1)
    return (order[None, :] <= order[:, None])[None, None] & keys[:, None, None, :]
