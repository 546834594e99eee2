"""AutoencoderKLTemporalDecoder: Stable Video Diffusion's (arXiv 2311.15127); it encodes pictures and decodes clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mc_export.autoencoders.base import Autoencoder, Reach, Strides
from mc_export.autoencoders.pictures import PictureEncoderProgram, prepare_upsampling, unit_pixels
from mc_export.autoencoders.scaling import LatentScaling
from mc_export.program.base import Axis, Extents, Program, float_tensor, shape_of


class TemporalDecoder(Autoencoder):
    """As ``StableVideoDiffusionPipeline`` runs it: frames are not folded, the decoder mixes neighbouring ones.

    The encoder gives the distribution's mode, which that pipeline takes without `scaling_factor`.
    """

    model_class = "AutoencoderKLTemporalDecoder"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.block_out_channels) - 1))

    def scaling(self, config: Any) -> LatentScaling:
        return LatentScaling(config.scaling_factor)

    def latent_channels(self, config: Any) -> int:
        return int(config.latent_channels)

    def program(self, component: str, vae: nn.Module, reach: Reach) -> Program:
        prepare_upsampling(vae)
        made = TemporalDecoderProgram if component == "vae_decoder" else PictureEncoderProgram
        return made(self, vae, reach)


class TemporalDecoderProgram(Program):
    """`latents` `[B, C, T, H, W]` as denoised, to `pixels` `[B, T, h, w, 3]` in [0, 1].

    A clip decoded in several runs equals the published pipeline's with as many frames as `decode_chunk_size`: a frame at a
    run's end does not see the next run's.
    """

    component = "vae_decoder"

    def __init__(self, autoencoder: Autoencoder, vae: nn.Module, reach: Reach) -> None:
        super().__init__()
        self.vae = vae
        self.scaling = autoencoder.scaling(vae.config)
        self.inputs = (float_tensor("latents", "B", autoencoder.latent_channels(vae.config), "T", "H", "W"),)
        self.outputs = (float_tensor("pixels", "B", "T", "h", "w", 3),)
        most = max(8, reach.max_cells)
        self.axes = {
            "B": Axis("B", 1, max(3, reach.max_batch), 3),
            "T": Axis("T", 1, max(8, reach.max_frames), 5),
            "H": Axis("H", 2, most, 4),
            "W": Axis("W", 2, most, 2),
        }

    def forward(self, latents: Tensor) -> Tensor:
        frames = latents.shape[2]
        folded = self.scaling.values(latents.transpose(1, 2).flatten(0, 1))
        pixels = unit_pixels(self.vae.decode(folded, num_frames=frames, return_dict=False)[0])
        return pixels.unflatten(0, (latents.shape[0], frames))

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Standard normal latents: what the sampler works towards."""
        generator = torch.Generator().manual_seed(seed)
        return {"latents": torch.randn(shape_of(self.inputs[0], extents), generator=generator)}
