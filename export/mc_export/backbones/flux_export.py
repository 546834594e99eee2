"""FLUX as engines run it: the same numbers, without what no step changes and with phases that survive bf16."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

TIMESTEP_SINUSOIDS = "time_text_embed.time_proj"
GUIDANCE_SINUSOIDS = "time_text_embed.guidance_proj"
_SCALE_OF_GUIDANCE = 1000  # the model multiplies the guidance scale by it before it takes its sinusoids


def prepare_flux(model: Any) -> None:
    """Changes a ``FluxTransformer2DModel`` in place; afterwards its context is the embedded one."""
    model.context_embedder = nn.Identity()
    model.pos_embed = RotaryPositions(model.pos_embed)
    if model.config.guidance_embeds:
        model.time_text_embed = TimeGuidanceTextEmbedding(model.time_text_embed)


class TimeGuidanceTextEmbedding(nn.Module):
    """``CombinedTimestepGuidanceTextProjEmbeddings`` whose timestep and guidance have a layer of sinusoids each.

    The published one calls one layer with both. The guidance scale meets its frequencies unscaled, with the factor in the
    frequencies: 4300 is 4288 in bf16, another guidance for the upper frequencies.

    Args:
        published: the module it stands for; its layers are used, not copied.
    """

    def __init__(self, published: Any) -> None:
        super().__init__()
        layer = published.time_proj
        self.time_proj = layer
        self.guidance_proj = Timesteps(
            layer.num_channels, layer.flip_sin_to_cos, layer.downscale_freq_shift, scale=_SCALE_OF_GUIDANCE
        )
        self.timestep_embedder = published.timestep_embedder
        self.guidance_embedder = published.guidance_embedder
        self.text_embedder = published.text_embedder

    def forward(self, timestep: Tensor, guidance: Tensor, pooled_projection: Tensor) -> Tensor:
        """Timesteps and guidance scales `[N]`, both times 1000, and pooled vectors `[N, P]`, to the modulation `[N, D]`."""
        dtype = pooled_projection.dtype
        time: Tensor = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        scale: Tensor = self.guidance_embedder(self.guidance_proj(guidance / _SCALE_OF_GUIDANCE).to(dtype))
        text: Tensor = self.text_embedder(pooled_projection)
        return time + scale + text


class RotaryPositions(nn.Module):
    """``FluxPosEmbed`` in float32: not every inference library has cosines of doubles.

    Positions are small integers, so that a phase is off by one rounding of float32.

    Args:
        published: the module it stands for.
    """

    def __init__(self, published: Any) -> None:
        super().__init__()
        self.axes = len(published.axes_dim)
        for axis, dim in enumerate(published.axes_dim):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            frequencies = (1.0 / published.theta**exponents).float().repeat_interleave(2)
            self.register_buffer(f"frequencies_{axis}", frequencies, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `[S, axes]` to cosines and sines `[S, head width]`, every number twice, side by side."""
        phases = torch.cat([ids[:, axis, None] * self.get_buffer(f"frequencies_{axis}") for axis in range(self.axes)], dim=1)
        return phases.cos(), phases.sin()
