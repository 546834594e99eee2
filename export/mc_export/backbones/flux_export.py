"""FLUX as engines run it: the same numbers, without what no step changes and with phases that survive bf16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from mc_export.backbones.rotary import rotated_heads

TIMESTEP_SINUSOIDS = "time_text_embed.time_proj"
GUIDANCE_SINUSOIDS = "time_text_embed.guidance_proj"
_SCALE_OF_GUIDANCE = 1000  # the model multiplies the guidance scale by it before it takes its sinusoids


def prepare_flux(model: Any) -> None:
    """Changes a ``FluxTransformer2DModel`` in place; afterwards its context is the embedded one."""
    model.context_embedder = nn.Identity()
    model.pos_embed = RotaryPositions(model.pos_embed)
    for module in model.modules():
        if isinstance(module, FluxAttention):
            module.set_processor(TurnedAttention())
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
            frequencies = (1.0 / published.theta**exponents).float()
            self.register_buffer(f"frequencies_{axis}", frequencies, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions `[S, axes]` to cosines and sines `[S, head width / 2]`; the published tables hold each entry twice."""
        phases = torch.cat([ids[:, axis, None] * self.get_buffer(f"frequencies_{axis}") for axis in range(self.axes)], dim=1)
        return phases.cos(), phases.sin()


class TurnedAttention:
    """``FluxAttnProcessor`` without its detour through pairs; see `rotated_heads`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens `[N, S, D]`, of the picture where text has a stream of its own, or of both; angles of both, text first."""
        assert image_rotary_emb is not None  # the model's forward always has them
        heads = self._heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            of_text = self._heads(attn, encoder_hidden_states, projections, (attn.norm_added_q, attn.norm_added_k))
            heads = [torch.cat(pair, dim=1) for pair in zip(of_text, heads, strict=True)]
        query, key = (rotated_heads(states, *image_rotary_emb) for states in heads[:2])
        attended = F.scaled_dot_product_attention(query, key, heads[2].transpose(1, 2), attn_mask=attention_mask)
        joined = attended.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return joined
        rows = encoder_hidden_states.shape[1]
        return attn.to_out[0](joined[:, rows:]), attn.to_add_out(joined[:, :rows])

    @staticmethod
    def _heads(attn: Any, states: Tensor, projections: Any, norms: Any) -> list[Tensor]:
        """Queries and keys, normed, and values: `[N, S, heads, d]`."""
        query, key, value = (projection(states).unflatten(-1, (-1, attn.head_dim)) for projection in projections)
        return [norms[0](query), norms[1](key), value]
