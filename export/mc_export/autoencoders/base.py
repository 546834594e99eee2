"""What the rest of the exporter needs to know of an autoencoder; each class answers in one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar


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


class Autoencoder(ABC):
    """One class of autoencoder.

    Attributes:
        model_class: its name in diffusers, as in ``model_index.json``.
    """

    model_class: ClassVar[str]

    @abstractmethod
    def strides(self, config: Any) -> Strides:
        """How its latents lie over pixels; ``config`` is the model's, with the class's defaults filled in."""
