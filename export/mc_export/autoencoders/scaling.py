"""Between the values an autoencoder gives and the latents a backbone takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LatentScaling(nn.Module):
    """``latents = (values - shift) * scale``, channel by channel.

    Args:
        scale, shift: one number, or one a channel.
        rank: dimensions of the latents behind the channels: 2 for pictures, 3 for clips.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: float | Sequence[float], shift: float | Sequence[float] = 0.0, *, rank: int = 2) -> None:
        super().__init__()
        for name, numbers in (("scale", scale), ("shift", shift)):
            tensor = torch.tensor(numbers, dtype=torch.float64).reshape(-1, *(1,) * rank)
            self.register_buffer(name, tensor.float(), persistent=False)
        if not bool((self.scale != 0).all()):
            raise ValueError("a latent scale of zero")
        self._shifts = bool((self.shift != 0).any())

    def values(self, latents: Tensor) -> Tensor:
        """What the autoencoder decodes, from a backbone's latents ``[B, C, ...]``."""
        values = latents / self.scale
        return values + self.shift if self._shifts else values

    def latents(self, values: Tensor) -> Tensor:
        """What a backbone takes, from what the autoencoder encoded ``[B, C, ...]``."""
        shifted = values - self.shift if self._shifts else values
        return shifted * self.scale
