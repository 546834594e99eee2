"""AutoencoderKL: the autoencoder of Stable Diffusion, SDXL and FLUX (arXiv 2112.10752); pictures only."""

from __future__ import annotations

from typing import Any

from mc_export.autoencoders.base import Autoencoder, Strides


class Kl(Autoencoder):
    """As ``StableDiffusionXLPipeline``, ``FluxKontextPipeline`` and ``AnimateDiffPipeline`` run it."""

    model_class = "AutoencoderKL"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.block_out_channels) - 1))
