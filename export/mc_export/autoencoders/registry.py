"""Finds an autoencoder's description by its diffusers class."""

from __future__ import annotations

from mc_export.autoencoders.base import Autoencoder
from mc_export.autoencoders.dc import DeepCompression
from mc_export.autoencoders.kl import Kl
from mc_export.autoencoders.temporal_decoder import TemporalDecoder
from mc_export.autoencoders.wan import Wan

AUTOENCODERS: dict[str, Autoencoder] = {
    autoencoder.model_class: autoencoder for autoencoder in (DeepCompression(), Kl(), TemporalDecoder(), Wan())
}
