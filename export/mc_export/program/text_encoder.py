"""The `text_encoder` engine: a checkpoint's own language model, ending in the context the backbone's step takes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mc_export.program.base import Axis, Extents, Program, float_tensor, int_tensor, right_padded_mask


class TextEncoderProgram(Program):
    """`input_ids` and `attention_mask` `[B, L]` (right padded), `select` `[S]` (rows kept), to `context` `[B, S, D]`.

    Args:
        encoder: a transformers decoder without a head (Gemma 2, as SANA has it).
        context: what the backbone makes of the encoder's states before its first step (`Backbone.take_context`).
        context_dim: width of the result.
        max_length: the longest padded sequence.
        max_batch: the largest batch.
    """

    component = "text_encoder"

    def __init__(
        self, encoder: nn.Module, context: nn.Module, context_dim: int, *, max_length: int = 4096, max_batch: int = 64
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.inputs = (int_tensor("input_ids", "B", "L"), int_tensor("attention_mask", "B", "L"), int_tensor("select", "S"))
        self.outputs = (float_tensor("context", "B", "S", context_dim),)
        length = max(16, max_length)
        self.axes = {
            "B": Axis("B", 1, max(2, max_batch), 2),
            "L": Axis("L", 1, length, 9),
            "S": Axis("S", 1, length, 5),
        }

    def forward(self, input_ids: Tensor, attention_mask: Tensor, select: Tensor) -> Tensor:
        config = self.encoder.config
        masks = {
            "full_attention": causal_bias(attention_mask, None),
            "sliding_attention": causal_bias(attention_mask, getattr(config, "sliding_window", None)),
        }
        states = self.encoder(
            input_ids=input_ids,
            attention_mask={kind: masks[kind] for kind in set(config.layer_types)},
            position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
            use_cache=False,
        ).last_hidden_state
        context: Tensor = self.context(states.index_select(1, select))
        return context

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Random ids; rows of different lengths; the first row and the last ones are selected."""
        generator = torch.Generator().manual_seed(seed)
        batch, length, rows = extents["B"], extents["L"], extents["S"]
        mask = right_padded_mask(batch, length)
        ids = torch.randint(3, self.encoder.config.vocab_size, (batch, length), generator=generator)
        select = torch.arange(rows) + max(0, length - rows)
        return {"input_ids": ids * mask, "attention_mask": mask, "select": select.clamp_max(length - 1)}


def causal_bias(attention_mask: Tensor, window: int | None) -> Tensor:
    """What is added to the scores, `[B, 1, L, L]`: 0 where a row (dim 2) may see a row (dim 3), else the lowest float.

    Args:
        attention_mask: `[B, L]`, 1 at real tokens, right padded, so that no row is without anything to see.
        window: rows a row sees back, itself included; None for all.
    """
    order = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    distance = order[:, None] - order[None, :]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    visible = visible[None, None] & (attention_mask != 0)[:, None, None, :]
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)
