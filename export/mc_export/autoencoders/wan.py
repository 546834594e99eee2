"""AutoencoderKLWan: the causal video autoencoder of Wan 2.1 and 2.2 (arXiv 2503.20314)."""

from __future__ import annotations

from typing import Any

from torch import nn

from mc_export.autoencoders.base import Autoencoder, Reach, Strides
from mc_export.autoencoders.scaling import LatentScaling
from mc_export.autoencoders.wan_chunks import WanDecoderProgram, WanEncoderProgram
from mc_export.program.base import Program


class Wan(Autoencoder):
    """As ``WanPipeline``, ``WanImageToVideoPipeline`` and ``WanVideoToVideoPipeline`` run it.

    All convolutions in time are causal, so a clip goes through in chunks, each with the last frames that every convolution saw
    of the one before: of any length, in the same memory, with the numbers of the whole. The first latent frame stands for
    one frame of the clip, every later one for four; each kind of chunk has a graph of its own. The encoder gives the
    distribution's mode, which those pipelines take.
    """

    model_class = "AutoencoderKLWan"
    components = ("vae_decoder", "vae_decoder_next", "vae_encoder", "vae_encoder_next")

    def strides(self, config: Any) -> Strides:
        space = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        return Strides(time=2 ** sum(map(bool, config.temperal_downsample)), space=space)

    def scaling(self, config: Any) -> LatentScaling:
        return LatentScaling([1 / deviation for deviation in config.latents_std], config.latents_mean, rank=3)

    def latent_channels(self, config: Any) -> int:
        return int(config.z_dim)

    def program(self, component: str, vae: nn.Module, reach: Reach) -> Program:
        made = WanDecoderProgram if component.startswith("vae_decoder") else WanEncoderProgram
        return made(self, vae, reach, first=not component.endswith("_next"))
