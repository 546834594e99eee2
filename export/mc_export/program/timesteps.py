"""Timesteps that survive bf16: their sinusoids are computed once, straight from the input.

Between 512 and 1000, bf16 numbers are 4 apart. OpenVINO's bf16 hint rounds whatever only changes a tensor's shape, marked for
float32 or not, and its fusions of constants lose such marks: a timestep that is reshaped, repeated over branches or scaled
before it meets its frequencies reaches the model as another timestep. One product and its sine and cosine keep their marks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

_MAX_PERIOD = 10000.0


class SharedSinusoids(nn.Module):
    """The sinusoidal embedding that all `Timesteps` layers of one model share.

    The layers found are replaced by ones that return what was last given to `publish`, whatever they are called with.

    Args:
        module: where the layers are; changed in place.

    Raises:
        ValueError: there are none, or they differ.
    """

    frequencies: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        names = [name for name, layer in module.named_modules() if isinstance(layer, Timesteps)]
        layers: Sequence[Timesteps] = [module.get_submodule(name) for name in names]
        settings = {
            (layer.num_channels, layer.flip_sin_to_cos, layer.downscale_freq_shift, layer.scale) for layer in layers
        }
        if len(settings) != 1:
            raise ValueError(f"expected timestep embeddings of one kind, found {sorted(settings)}")
        channels, self.flip, shift, scale = settings.pop()
        if channels % 2:
            raise ValueError(f"a timestep embedding of {channels} channels has no pairs")
        exponents = -math.log(_MAX_PERIOD) * torch.arange(channels // 2, dtype=torch.float32) / (channels // 2 - shift)
        self.register_buffer("frequencies", exponents.exp()[:, None] * scale, persistent=False)
        self._published = _Published()
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, _PublishedSinusoids(self._published))

    def forward(self, timestep: Tensor) -> Tensor:
        """Timesteps `[B]` to sinusoids `[B, channels]`, as `Timesteps` gives them."""
        phases = self.frequencies * timestep  # [channels / 2, B]: no reshape lies between the input and this product
        pair = (phases.cos(), phases.sin()) if self.flip else (phases.sin(), phases.cos())
        return torch.cat(pair).T

    def publish(self, sinusoids: Tensor) -> None:
        """Sets what the replaced layers return: `[N, channels]`, one row for each timestep they will be called with."""
        self._published.value = sinusoids


class _Published:
    """Holds the sinusoids of the pass under way; a plain object, so that tracing sees no assignment to a module."""

    value: Tensor | None = None


class _PublishedSinusoids(nn.Module):
    def __init__(self, published: _Published) -> None:
        super().__init__()
        self._published = published

    def forward(self, timesteps: Tensor) -> Tensor:
        assert self._published.value is not None
        return self._published.value
