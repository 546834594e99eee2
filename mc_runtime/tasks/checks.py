"""Arguments of a request, each checked against what the bundle can do; errors say what can be served instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.manifest import Frames, Manifest, Sizes
from mc_runtime.errors import RequestError, shown
from mc_runtime.sampling.noise import SEED_LIMIT, validated_seed

Output = Literal["images", "latents"]
MAX_IMAGES = 1024
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_OUTPUTS = ("images", "latents")


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
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_iswhole_number(side) for side in size):
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


def _iswhole_number(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within bounds. Raises RequestError."""
    if not _iswhole_number(value) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return int(value)


def checked_guidance(manifest: Manifest, scale: Any) -> float:
    """A guidance scale that the model takes, the default for None. Raises RequestError."""
    if scale is None:
        return manifest.guidance.default
    number = scale if isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool) else math.nan
    if not 0 <= number <= _LARGEST_FLOAT:
        raise RequestError(f"guidance_scale must be a number of 0 or more (1 turns guidance off), got {shown(scale)}")
    number = float(number)
    if number > 1 and manifest.guidance.branches == 1 and not manifest.guidance.embedded:
        raise RequestError(f"this bundle's model takes no guidance; leave guidance_scale out (got {shown(scale)})")
    return number


def checked_true_cfg(manifest: Manifest, scale: Any, negatives: Sequence[str]) -> float:
    """The negative prompts' own scale. Raises RequestError where the bundle has none, or a negative prompt would do nothing."""
    number = checked_number("true_cfg_scale", scale, 0, _LARGEST_FLOAT)
    if number != 1 and not manifest.guidance.true_cfg:
        raise RequestError("this bundle weighs a negative prompt by guidance_scale, if at all; leave true_cfg_scale out")
    if any(negatives) and manifest.guidance.branches == 1:
        if not manifest.guidance.true_cfg:
            raise RequestError("this bundle's model takes no negative prompt; leave negative_prompt out")
        if number <= 1:
            raise RequestError("a negative prompt has a scale of its own in this bundle; give true_cfg_scale above 1, too")
    return number


def checked_seeds(seed: Any, images: int) -> tuple[int, ...]:
    """One seed a result, counted up from one or given one by one. Raises RequestError."""
    if isinstance(seed, (Sequence, np.ndarray)) and np.ndim(seed) and not isinstance(seed, (str, bytes)):
        if len(seed) != images:
            raise RequestError(f"{len(seed)} seeds for {images} images; give one seed, or one an image")
        return tuple(validated_seed(one) for one in seed)
    first = validated_seed(seed)
    if first + images > SEED_LIMIT:
        raise RequestError(f"seed {first} leaves no room for {images} images; choose a smaller one")
    return tuple(range(first, first + images))


def checked_latents(latents: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The caller's own noise as finite f32 of `shape`. Raises RequestError."""
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


def one_each(negatives: tuple[str, ...], prompts: int) -> tuple[str, ...]:
    """One negative prompt a prompt. Raises RequestError."""
    if len(negatives) == 1:
        return negatives * prompts
    if len(negatives) != prompts:
        raise RequestError(f"{len(negatives)} negative prompts for {prompts} prompts; give one, or one a prompt")
    return negatives


def checked_output(output: Any) -> Output:
    """What to stop at. Raises RequestError."""
    if not isinstance(output, str) or output not in _OUTPUTS:
        raise RequestError(f"output must be {' or '.join(map(repr, _OUTPUTS))}, got {shown(output)}")
    return "latents" if output == "latents" else "images"


def checked_frames(frames: Frames, count: Any) -> int:
    """Pixel frames that the bundle serves, its default for None. Raises RequestError naming the nearest ones."""
    if count is None:
        return frames.default
    asked = whole_number("frames", count, 1, 1_000_000)
    if frames.serves(asked):
        return asked
    below = frames.first + max(0, min(asked, frames.max) - frames.first) // frames.multiple * frames.multiple
    above = below + frames.multiple
    near = [str(number) for number in (below, above) if frames.serves(number)]
    rule = f"{frames.first} + k * {frames.multiple}, " if frames.multiple > 1 else f"{frames.first} or more, "
    raise RequestError(f"{asked} frames are not served: {rule}up to {frames.max}; the nearest is {' or '.join(near)}")


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number within bounds. Raises RequestError."""
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)
