"""What the rest of the exporter needs to know of an autoencoder; each class answers in one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from mc_export.autoencoders.scaling import LatentScaling
from mc_export.program.base import Program


@dataclass(frozen=True)
class Strides:
    """How latents lie over pixels.

    Attributes:
        time: frames per latent frame after the first, which stands for one; 1 where frames are not folded.
        space: pixels per latent cell along height and width.
    """

    time: int
    space: int

    def __post_init__(self) -> None:
        if self.time < 1 or self.space < 1:
            raise ValueError(f"strides must be at least 1, found {self.time} in time and {self.space} in space")

    def frames(self, latent_frames: int) -> int:
        """Frames that this many latent frames decode to."""
        return 1 + (latent_frames - 1) * self.time

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip.

        Raises:
            ValueError: no whole number of latent frames stands for so many frames.
        """
        if frames < 1 or (frames - 1) % self.time:
            raise ValueError(f"{frames} frames are not 1 + a multiple of {self.time}")
        return 1 + (frames - 1) // self.time


@dataclass(frozen=True)
class Reach:
    """How far the dynamic dimensions of an autoencoder's engines go, and what its encoder is for.

    Attributes:
        max_batch: pictures or clips at once; frames count as pictures where the autoencoder knows pictures only.
        max_cells: latent cells along height and width.
        max_frames: latent frames that a decoder of whole clips takes at once.
        scale_encoded: whether the backbone takes encoded pictures in the scale of its own latents. SVD does not: it is
            conditioned on the autoencoder's own values.
    """

    max_batch: int = 64
    max_cells: int = 128
    max_frames: int = 32
    scale_encoded: bool = True


class Autoencoder(ABC):
    """One class of autoencoder.

    Attributes:
        model_class: its name in diffusers, as in ``model_index.json``.
        components: the engines it gives; one that ends in ``_next`` takes up where the one before it left a clip.
    """

    model_class: ClassVar[str]
    components: ClassVar[tuple[str, ...]] = ("vae_decoder", "vae_encoder")

    @abstractmethod
    def strides(self, config: Any) -> Strides:
        """How its latents lie over pixels; ``config`` is the model's, with the class's defaults filled in."""

    @abstractmethod
    def scaling(self, config: Any) -> LatentScaling:
        """How a backbone's latents follow from the autoencoder's own values."""

    @abstractmethod
    def latent_channels(self, config: Any) -> int:
        """Channels of the latents."""

    @abstractmethod
    def program(self, component: str, vae: nn.Module, reach: Reach) -> Program:
        """One of its engines; ``vae`` may be changed in place, with the same results."""
