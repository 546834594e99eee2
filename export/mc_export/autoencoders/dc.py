"""AutoencoderDC: the deep compression autoencoder of SANA (arXiv 2410.10733); deterministic, pictures only."""

from __future__ import annotations

from typing import Any

from mc_export.autoencoders.base import Autoencoder, Strides


class DeepCompression(Autoencoder):
    """As ``SanaPipeline`` runs it."""

    model_class = "AutoencoderDC"

    def strides(self, config: Any) -> Strides:
        return Strides(time=1, space=2 ** (len(config.encoder_block_out_channels) - 1))
