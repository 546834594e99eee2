"""AutoencoderKLWan: the causal video autoencoder of Wan 2.1 and 2.2 (arXiv 2503.20314)."""

from __future__ import annotations

from typing import Any

from mc_export.autoencoders.base import Autoencoder, Strides


class Wan(Autoencoder):
    """As ``WanPipeline`` and ``WanImageToVideoPipeline`` run it."""

    model_class = "AutoencoderKLWan"

    def strides(self, config: Any) -> Strides:
        space = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        return Strides(time=2 ** sum(map(bool, config.temperal_downsample)), space=space)
