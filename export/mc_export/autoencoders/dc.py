"""AutoencoderDC: the deep compression autoencoder of SANA (arXiv 2410.10733); deterministic, pictures only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn

from mc_export.autoencoders.base import Autoencoder, Reach, Strides
from mc_export.autoencoders.pictures import picture_program
from mc_export.autoencoders.scaling import LatentScaling
from mc_export.program.base import Program


class DeepCompression(Autoencoder):
    """As ``SanaPipeline`` runs it."""

    model_class = "AutoencoderDC"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.encoder_block_out_channels) - 1))

    def scaling(self, config: Any) -> LatentScaling:
        return LatentScaling(config.scaling_factor)

    def latent_channels(self, config: Any) -> int:
        return int(config.latent_channels)

    def program(self, component: str, vae: nn.Module, reach: Reach) -> Program:
        for module in vae.modules():
            if isinstance(module, SanaMultiscaleLinearAttention):
                module.processor = MultiscaleLinearAttention()
        return picture_program(self, component, vae, reach)


class MultiscaleLinearAttention:
    """`SanaMultiscaleAttnProcessor2_0` without its branch on the size, and with a denominator that survives the ONNX optimiser.

    The published processor takes the quadratic form where a picture has no more cells than a head has channels. Both forms
    are one expression bracketed differently, `sum_j v_j (k_j . q_i) / sum_j (k_j . q_i)`, so the linear one serves every size.
    """

    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        batch, _, height, width = hidden_states.shape
        residual = hidden_states
        pixels = hidden_states.movedim(1, -1)
        projected = [attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels)]
        states = torch.cat(projected, dim=3).movedim(-1, 1)
        states = torch.cat([states, *(scale(states) for scale in attn.to_qkv_multiscale)], dim=1).float()
        query, key, value = states.reshape(batch, -1, 3 * attn.attention_head_dim, height * width).chunk(3, dim=2)
        query, key = attn.nonlinearity(query), attn.nonlinearity(key)
        # [.., d, N] x [.., N, d] -> d x d; the denominator has its own row sums instead of a padded row of ones.
        attended = (value @ key.transpose(-1, -2)) @ query
        normaliser = key.sum(dim=-1)[..., None, :] @ query
        attended = attended / normaliser.clamp_min(attn.eps)
        attended = attended.reshape(batch, -1, height, width).to(hidden_states.dtype)
        output = attn.to_out(attended.movedim(1, -1))
        channels_last = attn.norm_type == "rms_norm"
        output = attn.norm_out(output).movedim(-1, 1) if channels_last else attn.norm_out(output.movedim(-1, 1))
        result: Tensor = output + residual if attn.residual_connection else output
        return result
