"""The `image_encoder` engine: a picture to the context of a backbone that is conditioned on its CLIP embedding."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mc_export.model.antialiasing import antialiased_resize_matrix
from mc_export.program.base import Axis, Extents, Program, float_tensor, shape_of


class ImageEncoderProgram(Program):
    """`pixels` `[B, h, w, 3]` in [0, 1], a picture in its own size, to `context` `[B, 1, D]`.

    The picture is squeezed to the encoder's square as `StableVideoDiffusionPipeline` does it.

    Args:
        encoder: transformers' `CLIPVisionModelWithProjection`.
        mean, deviation: of the channels, as its image processor has them.
        context: what the backbone makes of the embedding before its first step (`Backbone.context_preparation`).
        context_dim: width of the result.
        max_batch: the largest batch.
        max_side: the longest side of a picture.
    """

    component = "image_encoder"
    adaptable = MappingProxyType({"context": ""})

    def __init__(
        self,
        encoder: nn.Module,
        mean: Sequence[float],
        deviation: Sequence[float],
        context: nn.Module,
        context_dim: int,
        *,
        max_batch: int = 64,
        max_side: int = 4096,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.context = context
        self.side = int(encoder.config.image_size)
        self.register_buffer("mean", torch.tensor(list(mean))[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(list(deviation))[:, None, None], persistent=False)
        self.inputs = (float_tensor("pixels", "B", "h", "w", 3),)
        self.outputs = (float_tensor("context", "B", 1, context_dim),)
        self.axes = {
            "B": Axis("B", 1, max(2, max_batch), 2),
            "h": Axis("h", 16, max_side, 3 * self.side + 5),
            "w": Axis("w", 16, max_side, 2 * self.side + 3),
        }

    def forward(self, pixels: Tensor) -> Tensor:
        rows = antialiased_resize_matrix(pixels.shape[1], self.side, pixels.device)
        columns = antialiased_resize_matrix(pixels.shape[2], self.side, pixels.device)
        picture = rows @ pixels.permute(0, 3, 1, 2) @ columns.T
        embedding = self.encoder((picture - self.get_buffer("mean")) / self.get_buffer("deviation")).image_embeds
        context: Tensor = self.context(embedding[:, None])
        return context

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Uniform pixels."""
        generator = torch.Generator().manual_seed(seed)
        return {"pixels": torch.rand(shape_of(self.inputs[0], extents), generator=generator)}
