"""Finds an autoencoder's description by its diffusers class."""

from __future__ import annotations

from torch import nn

from mc_export.autoencoders.base import Autoencoder, Reach
from mc_export.autoencoders.dc import DeepCompression
from mc_export.autoencoders.kl import Kl
from mc_export.autoencoders.temporal_decoder import TemporalDecoder
from mc_export.autoencoders.wan import Wan
from mc_export.program.base import Program

AUTOENCODERS: dict[str, Autoencoder] = {
    autoencoder.model_class: autoencoder for autoencoder in (DeepCompression(), Kl(), TemporalDecoder(), Wan())
}


def vae_program(component: str, vae: nn.Module, reach: Reach | None = None) -> Program:
    """One engine of a loaded autoencoder, which may be changed in place, with the same results."""
    return AUTOENCODERS[type(vae).__name__].program(component, vae, reach or Reach())
