"""AutoencoderKLTemporalDecoder: Stable Video Diffusion's (arXiv 2311.15127); it encodes pictures and decodes clips."""

from __future__ import annotations

from typing import Any

from mc_export.autoencoders.base import Autoencoder, Strides


class TemporalDecoder(Autoencoder):
    """As ``StableVideoDiffusionPipeline`` runs it: frames are not folded, the decoder mixes neighbouring ones."""

    model_class = "AutoencoderKLTemporalDecoder"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.block_out_channels) - 1))
