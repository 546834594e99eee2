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
    """The sinusoidal embeddings that some `Timesteps` layers of a model make of one timestep.

    The layers are replaced by ones that return what was last given to `publish`, whatever they are called with. Layers of one
    kind share one embedding.

    Args:
        module: where the layers are; changed in place.
        names: of the layers.
        rank: dimensions of what they embed: 1 for timesteps `[B]`, 2 for several numbers a sample `[B, n]`.

    Raises:
        ValueError: a layer is no `Timesteps`, or has no pairs of channels.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], rank: int = 1) -> None:
        super().__init__()
        self._kinds: dict[tuple[int, bool, float, float], int] = {}
        self._published: list[_Published] = []
        for name in names:
            layer = module.get_submodule(name)
            if not isinstance(layer, Timesteps) or layer.num_channels % 2:
                raise ValueError(f"{name} is no timestep embedding of pairs of channels")
            kind = (layer.num_channels, layer.flip_sin_to_cos, layer.downscale_freq_shift, layer.scale)
            if kind not in self._kinds:
                self._kinds[kind] = len(self._published)
                self._published.append(_Published())
                self.register_buffer(f"frequencies_{self._kinds[kind]}", _frequencies(layer, rank), persistent=False)
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, _PublishedSinusoids(self._published[self._kinds[kind]]))

    def forward(self, timestep: Tensor) -> list[Tensor]:
        """Timesteps `[B]` to sinusoids `[B, channels]` as `Timesteps` gives them, `[B, n]` to `[B, n, channels]`.

        One for each kind of layer.
        """
        sinusoids = []
        for (_, flip, _, _), index in self._kinds.items():
            # No reshape lies between the input and this product, [channels / 2, B, ...].
            phases = self.get_buffer(f"frequencies_{index}") * timestep
            pair = (phases.cos(), phases.sin()) if flip else (phases.sin(), phases.cos())
            sinusoids.append(torch.cat(pair).movedim(0, -1))
        return sinusoids

    def publish(self, sinusoids: Sequence[Tensor]) -> None:
        """Sets what the replaced layers return: one `[N, channels]` a kind, a row for each timestep of their calls."""
        for published, value in zip(self._published, sinusoids, strict=True):
            published.value = value


def _frequencies(layer: Timesteps, rank: int) -> Tensor:
    """Of a layer, `[channels / 2, 1]`, with as many dimensions of 1 as the timesteps have."""
    half = layer.num_channels // 2
    exponents = -math.log(_MAX_PERIOD) * torch.arange(half, dtype=torch.float32) / (half - layer.downscale_freq_shift)
    return exponents.exp().view(-1, *[1] * rank) * layer.scale


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
