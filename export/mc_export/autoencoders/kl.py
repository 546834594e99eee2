"""AutoencoderKL: the autoencoder of Stable Diffusion, SDXL and FLUX (arXiv 2112.10752); pictures only."""

from __future__ import annotations

from typing import Any

from torch import nn

from mc_export.autoencoders.base import Autoencoder, Reach, Strides
from mc_export.autoencoders.pictures import picture_program, prepare_upsampling
from mc_export.autoencoders.scaling import LatentScaling
from mc_export.program.base import Program


class Kl(Autoencoder):
    """As ``StableDiffusionXLPipeline``, ``FluxKontextPipeline`` and ``AnimateDiffPipeline`` run it.

    The encoder gives the distribution's mode, which is what ``FluxKontextPipeline`` takes. ``StableDiffusionXLImg2ImgPipeline``
    and ``AnimateDiffVideoToVideoPipeline`` draw a sample instead. ``force_upcast`` says that activations exceed float16, which
    no engine computes in; bfloat16 has float32's range, and diffusers does not upcast it either.
    """

    model_class = "AutoencoderKL"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.block_out_channels) - 1))

    def scaling(self, config: Any) -> LatentScaling:
        scale, mean, std = config.scaling_factor, config.latents_mean, config.latents_std
        if mean is not None and std is not None:  # SDXL's successors; the pipeline then leaves out the shift
            return LatentScaling([scale / deviation for deviation in std], mean)
        return LatentScaling(scale, config.shift_factor or 0.0)

    def latent_channels(self, config: Any) -> int:
        return int(config.latent_channels)

    def program(self, component: str, vae: nn.Module, reach: Reach) -> Program:
        prepare_upsampling(vae)
        return picture_program(self, component, vae, reach)
