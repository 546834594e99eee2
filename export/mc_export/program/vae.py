"""The autoencoder as two engines: `vae_decoder` (latents to pixels) and `vae_encoder` (pixels to latents)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn

from mc_export.program.base import Axis, Extents, Program, float_tensor, shape_of


class _VaeProgram(Program):
    """Shared by both directions: the autoencoder, prepared for export, and its dimensions.

    Args:
        vae: a diffusers autoencoder in evaluation mode; its attention is changed in place, with the same results.
        max_batch: the largest batch.
        max_cells: the largest latent extent along height and width.
    """

    def __init__(self, vae: nn.Module, *, max_batch: int = 64, max_cells: int = 128) -> None:
        super().__init__()
        prepare_vae_for_export(vae)
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)
        self.channels = int(vae.config.latent_channels)
        self.scale = pixels_per_latent(vae)
        self.batch = Axis("B", 1, max(2, max_batch), 2)
        self.max_cells = max(8, max_cells)


class VaeDecoderProgram(_VaeProgram):
    """`latents` `[B, C, H, W]` as denoised, to `pixels` `[B, h, w, 3]` in [0, 1]."""

    component = "vae_decoder"

    def __init__(self, vae: nn.Module, *, max_batch: int = 64, max_cells: int = 128) -> None:
        super().__init__(vae, max_batch=max_batch, max_cells=max_cells)
        self.inputs = (float_tensor("latents", "B", self.channels, "H", "W"),)
        self.outputs = (float_tensor("pixels", "B", "h", "w", 3),)
        self.axes = {"B": self.batch, "H": Axis("H", 2, self.max_cells, 4), "W": Axis("W", 2, self.max_cells, 3)}

    def forward(self, latents: Tensor) -> Tensor:
        image = self.vae.decode(latents / self.scaling_factor, return_dict=False)[0]
        pixels: Tensor = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return pixels

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Standard normal latents: what the sampler works towards."""
        generator = torch.Generator().manual_seed(seed)
        return {"latents": torch.randn(shape_of(self.inputs[0], extents), generator=generator)}


class VaeEncoderProgram(_VaeProgram):
    """`pixels` `[B, h, w, 3]` in [0, 1], to `latents` `[B, C, H, W]`, scaled as the backbone takes them."""

    component = "vae_encoder"

    def __init__(self, vae: nn.Module, *, max_batch: int = 64, max_cells: int = 128) -> None:
        super().__init__(vae, max_batch=max_batch, max_cells=max_cells)
        scale = self.scale
        self.inputs = (float_tensor("pixels", "B", "h", "w", 3),)
        self.outputs = (float_tensor("latents", "B", self.channels, "H", "W"),)
        self.axes = {
            "B": self.batch,
            "h": Axis("h", 2 * scale, self.max_cells * scale, 4 * scale, scale),
            "w": Axis("w", 2 * scale, self.max_cells * scale, 3 * scale, scale),
        }

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels.permute(0, 3, 1, 2) * 2 - 1, return_dict=False)[0]
        latents: Tensor = encoded * self.scaling_factor
        return latents

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Uniform pixels."""
        generator = torch.Generator().manual_seed(seed)
        return {"pixels": torch.rand(shape_of(self.inputs[0], extents), generator=generator)}


def pixels_per_latent(vae: nn.Module) -> int:
    """Pixels per latent cell along height and width."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio) if ratio else int(2 ** (len(vae.config.block_out_channels) - 1))


def prepare_vae_for_export(vae: nn.Module) -> None:
    """Replaces, in place, what does not survive export; outputs stay the same up to rounding."""
    for module in vae.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            module.processor = MultiscaleLinearAttention()


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
