"""The `text_encoder` engine: all of a checkpoint's own text encoders, ending in the context the backbone's step takes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.program.base import Axis, Extents, Program, float_tensor, int_tensor, right_padded_mask


class TextEncoderProgram(Program):
    """`input_ids` and `attention_mask` `[B, L]` (right padded) to `context` `[B, S, D]`.

    A second encoder reads `input_ids_2` and `attention_mask_2` `[B, L2]`. A backbone that keeps some rows only has `select`
    `[S]`; one that takes a pooled vector gets `pooled` `[B, P]` too.

    Args:
        backbone: how its pipeline runs the encoders.
        encoders: transformers models.
        context: what the backbone makes of the encoders' states before its first step (`Backbone.context_preparation`).
        context_dim: width of the result.
        pooled_dim: width of the pooled vector, or None.
        max_lengths: the longest padded sequence of each encoder.
        max_batch: the largest batch.
    """

    component = "text_encoder"
    adaptable = MappingProxyType({"context": ""})

    def __init__(
        self,
        backbone: Backbone,
        encoders: Sequence[nn.Module],
        context: nn.Module,
        context_dim: int,
        *,
        pooled_dim: int | None = None,
        max_lengths: Sequence[int] = (),
        max_batch: int = 64,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoders = nn.ModuleList(encoders)
        self.context = context
        lengths = [max(16, length) for length in max_lengths or [4096] * len(encoders)]
        self.suffixes = ["", *(f"_{index}" for index in range(2, len(encoders) + 1))]
        own = [f"L{suffix.lstrip('_')}" for suffix in self.suffixes]
        self.lengths = ["L"] * len(own) if backbone.encoders_share_length else own
        inputs = []
        for suffix, axis in zip(self.suffixes, self.lengths, strict=True):
            inputs += [int_tensor(f"input_ids{suffix}", "B", axis), int_tensor(f"attention_mask{suffix}", "B", axis)]
        rows = backbone.context_rows(self.lengths)
        if backbone.selects_rows:
            inputs.append(int_tensor("select", "S"))
            rows = "S"
        self.inputs = tuple(inputs)
        outputs = [float_tensor("context", "B", rows, context_dim)]
        if pooled_dim is not None:
            outputs.append(float_tensor("pooled", "B", pooled_dim))
        self.outputs = tuple(outputs)
        axes = [Axis("B", 1, max(2, max_batch), 2)]
        axes += [Axis(*own, 9 + index) for index, own in enumerate(zip(self.lengths, [1] * len(lengths), lengths, strict=True))]
        if backbone.selects_rows:
            axes.append(Axis("S", 1, lengths[0], 5))
        self.axes = {axis.name: axis for axis in axes}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        input_ids_2: Tensor | None = None,
        attention_mask_2: Tensor | None = None,
        select: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        ids = [tokens for tokens in (input_ids, input_ids_2) if tokens is not None]
        masks = [mask for mask in (attention_mask, attention_mask_2) if mask is not None]
        states = self.backbone.encode_text(list(self.encoders), ids, masks)
        context = states.context if select is None else states.context.index_select(1, select)
        context = self.context(context)
        return context if states.pooled is None else (context, states.pooled)

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Random ids; rows of different lengths; the last rows are selected."""
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Tensor] = {}
        for suffix, axis, encoder in zip(self.suffixes, self.lengths, self.encoders, strict=True):
            mask = right_padded_mask(extents["B"], extents[axis])
            ids = torch.randint(3, encoder.config.vocab_size, tuple(mask.shape), generator=generator)
            inputs |= {f"input_ids{suffix}": ids * mask, f"attention_mask{suffix}": mask}
        if self.backbone.selects_rows:
            rows, length = extents["S"], extents["L"]
            inputs["select"] = (torch.arange(rows) + max(0, length - rows)).clamp_max(length - 1)
        return inputs
