"""How much of this machine an input may take. A service that knows its callers sets its own."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class ImageLimits:
    """Of a picture: the `bytes` of its file, and the `pixels` it unpacks to, known before anything is unpacked."""

    bytes: int = 256 * 2**20
    pixels: int = 2**26

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class ClipLimits:
    """Of a clip.

    Attributes:
        bytes: of its file.
        pixels: of one frame.
        frames: that are unpacked, more than are kept where the rate is lowered.
        seconds: that it lasts, as far as it is read.
        kept_pixels: of all frames that come out, after their resize.
    """

    bytes: int = 2**30
    pixels: int = 2**25
    frames: int = 20_000
    seconds: float = 600
    kept_pixels: int = 2**29

    def __post_init__(self) -> None:
        _check(self)


def _check(limits: ImageLimits | ClipLimits) -> None:
    if not all(value > 0 for value in astuple(limits)):
        raise ValueError(f"limits are positive numbers, got {limits}")
