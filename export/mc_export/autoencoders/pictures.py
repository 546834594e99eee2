"""Engines of autoencoders that know pictures only: `vae_decoder` (latents to pixels) and `vae_encoder` (pixels to latents)."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from mc_export.autoencoders.base import Autoencoder, Reach
from mc_export.program.base import Axis, Extents, Program, float_tensor, shape_of


class PictureDecoderProgram(Program):
    """`latents` `[B, C, H, W]` as denoised, to `pixels` `[B, h, w, 3]` in [0, 1]."""

    component = "vae_decoder"

    def __init__(self, autoencoder: Autoencoder, vae: nn.Module, reach: Reach) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = autoencoder.scaling(vae.config)
        self.inputs = (float_tensor("latents", "B", autoencoder.latent_channels(vae.config), "H", "W"),)
        self.outputs = (float_tensor("pixels", "B", "h", "w", 3),)
        most = max(8, reach.max_cells)
        self.axes = {"B": Axis("B", 1, max(2, reach.max_batch), 2), "H": Axis("H", 2, most, 4), "W": Axis("W", 2, most, 3)}

    def forward(self, latents: Tensor) -> Tensor:
        return unit_pixels(self.vae.decode(self.scaling.values(latents), return_dict=False)[0])

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Standard normal latents: what the sampler works towards."""
        generator = torch.Generator().manual_seed(seed)
        return {"latents": torch.randn(shape_of(self.inputs[0], extents), generator=generator)}


class PictureEncoderProgram(Program):
    """`pixels` `[B, h, w, 3]` in [0, 1], to `latents` `[B, C, H, W]`: of a distribution its mode, in the backbone's scale
    unless the backbone takes the autoencoder's own."""

    component = "vae_encoder"

    def __init__(self, autoencoder: Autoencoder, vae: nn.Module, reach: Reach) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = autoencoder.scaling(vae.config) if reach.scale_encoded else None
        self.inputs = (float_tensor("pixels", "B", "h", "w", 3),)
        self.outputs = (float_tensor("latents", "B", autoencoder.latent_channels(vae.config), "H", "W"),)
        cell, most = autoencoder.strides(vae.config).space, max(8, reach.max_cells)
        self.axes = {
            "B": Axis("B", 1, max(2, reach.max_batch), 2),
            "h": Axis("h", 2 * cell, most * cell, 4 * cell, cell),
            "w": Axis("w", 2 * cell, most * cell, 3 * cell, cell),
        }

    def forward(self, pixels: Tensor) -> Tensor:
        encoded = self.vae.encode(pixels.movedim(-1, 1) * 2 - 1, return_dict=False)[0]
        values: Tensor = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scaling.latents(values) if self.scaling is not None else values

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Uniform pixels."""
        generator = torch.Generator().manual_seed(seed)
        return {"pixels": torch.rand(shape_of(self.inputs[0], extents), generator=generator)}


def unit_pixels(image: Tensor) -> Tensor:
    """Pixels in [0, 1] with the channels last, from a decoder's in [-1, 1] with the channels after the batch."""
    return (image / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def picture_program(autoencoder: Autoencoder, component: str, vae: nn.Module, reach: Reach) -> Program:
    """The decoder or the encoder."""
    made = PictureDecoderProgram if component == "vae_decoder" else PictureEncoderProgram
    return made(autoencoder, vae, reach)


def prepare_upsampling(vae: nn.Module) -> None:
    """Replaces, in place, what asks for the batch: diffusers' upsampling takes another memory layout from 64 pictures on, a
    branch that would limit the export to less."""
    for module in vae.modules():
        for name, child in module.named_children():
            if isinstance(child, Upsample2D):
                setattr(module, name, NearestUpsample(child.conv))


class NearestUpsample(nn.Module):
    """``Upsample2D`` as autoencoders have it: every cell four times, then a convolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, states: Tensor) -> Tensor:
        upsampled: Tensor = self.conv(functional.interpolate(states, scale_factor=2.0, mode="nearest"))
        return upsampled
