"""What a bundle serves: latents, sizes, lengths, guidance, steps, sampler and canvas."""

from __future__ import annotations

from dataclasses import dataclass

from mc_runtime.bundle.checks import at_least_one


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents' `channels`; along height and width, pixels per cell and cells per token; pixel `frames` per latent frame."""

    channels: int
    scale: int
    patch: int
    frames: int = 1

    def __post_init__(self) -> None:
        at_least_one(channels=self.channels, scale=self.scale, patch=self.patch, frames=self.frames)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Pixel frames of a video, `first + k * multiple`, and frames a second when the request names none."""

    default: int
    multiple: int
    first: int
    max: int
    fps: float

    def __post_init__(self) -> None:
        at_least_one(default=self.default, multiple=self.multiple, first=self.first, max=self.max)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps: expected more than 0 and at most 1000, found {self.fps:g}")
        if not self.serves(self.default):
            raise ValueError(f"default: {self.default} is none of {self.first} + k * {self.multiple} up to {self.max}")

    def serves(self, count: int) -> bool:
        """Whether a video of `count` frames can be made."""
        return self.first <= count <= self.max and (count - self.first) % self.multiple == 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes, (height, width) in pixels; `served` lists the only ones, where the engines have fixed shapes."""

    default: tuple[int, int]
    served: tuple[tuple[int, int], ...] | None = None
    multiple: int
    min: int
    max: int

    def __post_init__(self) -> None:
        at_least_one(multiple=self.multiple, min=self.min, max=self.max)
        if self.served is not None and self.default not in self.served:
            raise ValueError("default: is none of the served sizes")
        for size in (self.default, *(self.served or ())):
            if not all(side % self.multiple == 0 and self.min <= side <= self.max for side in size):
                raise ValueError(f"{list(size)}: sides must be multiples of {self.multiple} from {self.min} to {self.max}")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Default scale, and how many branches the step engine weighs.

    `embedded`: the model takes the scale as an input. `ramp_from`: the scale of a video's first frame, which rises to the
    request's at its last. With one branch and neither, the model takes no guidance. `zero_negative`: zeros stand for the
    states of an empty negative prompt. `true_cfg`: the step engine weighs a negative prompt too, by a scale of its own.
    """

    default: float
    branches: int
    embedded: bool = False
    ramp_from: float | None = None
    zero_negative: bool = False
    true_cfg: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.branches <= 3:
            raise ValueError(f"branches: expected 1, 2 or 3, found {self.branches}")
        if self.default < 0:
            raise ValueError(f"default: expected 0 or more, found {self.default:g}")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Denoising steps when the request names none, and the most the sampler table holds."""

    default: int
    max: int

    def __post_init__(self) -> None:
        at_least_one(default=self.default, max=self.max)
        if self.default > self.max:
            raise ValueError(f"default: {self.default} is more than max, {self.max}")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The table of linear multistep coefficients and the diffusers scheduler it was taken from."""

    file: str
    scheduler: str
    order: int
    dynamic_shift: bool

    def __post_init__(self) -> None:
        at_least_one(order=self.order)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Canvas tokens: the (t, h, w) grid, which follows the picture's size where `pixels_per_token` is set."""

    grid: tuple[int, int, int]
    pixels_per_token: int | None = None
    keyframes: int = 1

    def __post_init__(self) -> None:
        sides = dict(zip("thw", self.grid, strict=True))
        at_least_one(keyframes=self.keyframes, pixels_per_token=self.pixels_per_token or 1, **sides)

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The (t, h, w) grid for a picture of (height, width) pixels."""
        if self.pixels_per_token is None:
            return self.grid
        height, width = (-(-side // self.pixels_per_token) for side in size)
        return (self.grid[0], height, width)
