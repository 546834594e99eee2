"""Text to image: what a caller may ask for, checked against what the bundle can do before any engine runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.manifest import Manifest, Sizes
from mc_runtime.errors import RequestError, shown
from mc_runtime.sampling.noise import SEED_LIMIT, validated_seed

Output = Literal["images", "latents"]
MAX_IMAGES = 1024
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_OUTPUTS = ("images", "latents")


@dataclass(frozen=True, eq=False)
class TextToImage:
    """A request that this bundle can serve.

    Attributes:
        prompts: one or more prompts; each gets `num_images` images.
        negative_prompts: one a prompt.
        num_images: images a prompt.
        steps: denoising steps.
        guidance_scale: classifier-free guidance; at 1 and below it is off, and only the prompt's branch runs.
        size: (height, width) in pixels.
        seeds: one an image, prompt after prompt.
        latents: the caller's own unit noise f32 `[images, C, H, W]` in place of the seeds' noise.
        output: `images`, or `latents` to stop before the decoder.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    num_images: int
    steps: int
    guidance_scale: float
    size: tuple[int, int]
    seeds: tuple[int, ...]
    latents: NDArray[np.float32] | None
    output: Output

    @classmethod
    def from_arguments(
        cls,
        manifest: Manifest,
        *,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        output: str = "images",
    ) -> Self:
        """The request with the bundle's defaults filled in. Raises RequestError saying what can be served instead."""
        prompts = checked_prompts(prompt, "prompt")
        count = _whole("num_images", num_images, 1, MAX_IMAGES)
        side = checked_size(manifest.sizes, size)
        images = len(prompts) * count
        return cls(
            prompts=prompts,
            negative_prompts=_one_each(checked_prompts(negative_prompt, "negative_prompt"), len(prompts)),
            num_images=count,
            steps=_whole("steps", manifest.steps.default if steps is None else steps, 1, manifest.steps.max),
            guidance_scale=_guidance(manifest, guidance_scale),
            size=side,
            seeds=_seeds(seed, images),
            latents=None if latents is None else _latents(latents, (images, *latent_shape(manifest, side))),
            output=_output(output),
        )

    @property
    def uses_guidance(self) -> bool:
        """Whether the negative branch has any weight."""
        return self.guidance_scale > 1

    @property
    def branch_weights(self) -> tuple[float, ...]:
        """What the prompt's and the negative prompt's predictions are multiplied by before they are added."""
        return (self.guidance_scale, 1 - self.guidance_scale) if self.uses_guidance else (1.0,)


def latent_shape(manifest: Manifest, size: tuple[int, int]) -> tuple[int, int, int]:
    """(C, H, W) of one image's latents for a picture of (height, width) pixels."""
    height, width = size
    scale = manifest.latents.scale
    return manifest.latents.channels, height // scale, width // scale


def checked_prompts(prompt: Any, name: str) -> tuple[str, ...]:
    """One prompt or several as a tuple. Raises RequestError where it is anything but text."""
    prompts = (prompt,) if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"{name} must be a string or a list of strings, got {type(prompt).__name__}")
    if not prompts:
        raise RequestError(f"{name} is an empty list; give at least one")
    return tuple(prompts)


def checked_size(sizes: Sizes, size: Any) -> tuple[int, int]:
    """A (height, width) that the bundle serves, its default for None. Raises RequestError naming the nearest ones."""
    if size is None:
        return sizes.default
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_is_whole(side) for side in size):
        raise RequestError(f"size must be (height, width) in whole pixels, got {shown(size)}")
    height, width = (int(side) for side in size)
    if sizes.served is not None:
        if (height, width) in sizes.served:
            return height, width
        near = sorted(sizes.served, key=lambda other: abs(other[0] - height) + abs(other[1] - width))[:2]
        raise RequestError(
            f"size {_names([(height, width)])} is not served: this bundle was built for {_names(sizes.served)}; "
            f"the nearest is {_names(near[:1])}"
        )
    if all(side % sizes.multiple == 0 and sizes.min <= side <= sizes.max for side in (height, width)):
        return height, width
    near = list(zip(_nearest(sizes, height), _nearest(sizes, width), strict=True))
    raise RequestError(
        f"size {_names([(height, width)])} is not served: height and width must be multiples of {sizes.multiple} from "
        f"{sizes.min} to {sizes.max}; the nearest is {_names(dict.fromkeys(near))}"
    )


def _nearest(sizes: Sizes, side: int) -> tuple[int, int]:
    """The served sides below and above, both the same at the ends of the range."""
    lowest = math.ceil(sizes.min / sizes.multiple) * sizes.multiple
    highest = max(lowest, sizes.max // sizes.multiple * sizes.multiple)
    below = side // sizes.multiple * sizes.multiple
    above = -(-side // sizes.multiple) * sizes.multiple
    return min(max(below, lowest), highest), min(max(above, lowest), highest)


def _names(sizes: Any) -> str:
    return " or ".join(f"{shown(height)}x{shown(width)}" for height, width in sizes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not _is_whole(value) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return int(value)


def _guidance(manifest: Manifest, scale: Any) -> float:
    if scale is None:
        return manifest.guidance.default
    number = scale if isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool) else math.nan
    if not 0 <= number <= _LARGEST_FLOAT:
        raise RequestError(f"guidance_scale must be a number of 0 or more (1 turns guidance off), got {shown(scale)}")
    number = float(number)
    if number > 1 and manifest.guidance.branches == 1:
        raise RequestError(f"this bundle's model takes no guidance; leave guidance_scale out (got {shown(scale)})")
    return number


def _seeds(seed: Any, images: int) -> tuple[int, ...]:
    if isinstance(seed, (Sequence, np.ndarray)) and np.ndim(seed) and not isinstance(seed, (str, bytes)):
        if len(seed) != images:
            raise RequestError(f"{len(seed)} seeds for {images} images; give one seed, or one an image")
        return tuple(validated_seed(one) for one in seed)
    first = validated_seed(seed)
    if first + images > SEED_LIMIT:
        raise RequestError(f"seed {first} leaves no room for {images} images; choose a smaller one")
    return tuple(range(first, first + images))


def _latents(latents: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        given = np.asarray(latents)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise RequestError(f"latents must be an array of numbers, got {type(latents).__name__}") from None
    if given.dtype.kind not in "fiu":  # complex numbers, dates and objects would be cast, and lose what they mean
        raise RequestError(f"latents must be an array of real numbers, got {given.dtype} numbers in a {type(latents).__name__}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        array = np.array(given, dtype=np.float32)
    if array.shape == shape[1:] and shape[0] == 1:
        array = array[None]
    if array.shape != shape:
        raise RequestError(f"latents must have the shape {list(shape)} for this request, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise RequestError("latents hold NaN or infinite numbers; give finite noise")
    return array


def _one_each(negatives: tuple[str, ...], prompts: int) -> tuple[str, ...]:
    if len(negatives) == 1:
        return negatives * prompts
    if len(negatives) != prompts:
        raise RequestError(f"{len(negatives)} negative prompts for {prompts} prompts; give one, or one a prompt")
    return negatives


def _output(output: Any) -> Output:
    if not isinstance(output, str) or output not in _OUTPUTS:
        raise RequestError(f"output must be {' or '.join(map(repr, _OUTPUTS))}, got {shown(output)}")
    return "latents" if output == "latents" else "images"
