"""Pictures and clips to the patches that Qwen2.5-VL's vision tower reads, the same numbers as transformers' processors.

A picture is resized by Qwen2.5-VL's own rule with Pillow's bicubic filter, and is one frame that stands `temporal_patch` times;
a clip is first thinned out to a few frames a second, and its last frame repeated until the patches come out even.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip

Frames = NDArray[np.uint8]
"""`[F, h, w, 3]`."""
Picture = Union["Image.Image", NDArray[Any]]
"""A Pillow image, or an array `[h, w, 3]`: u8, or f32 in [0, 1]."""

MAX_RATIO = 200
"""How many times as long as the other a picture's longer side may be (Qwen2.5-VL's own limit)."""
MAX_PIXELS = 2**27
"""Most pixels of a picture, or of a clip's frame, before it is resized."""


Media = Union[Picture, "Clip"]
"""What a prompt may come with."""


def resized_size(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Qwen2.5-VL's rule: both sides multiples of `factor`, `least` to `most` pixels, the ratio kept as well as that allows.

    Raises:
        RequestError: one side is more than `MAX_RATIO` times the other.
    """
    if min(height, width) < 1 or max(height, width) > MAX_RATIO * min(height, width):
        raise RequestError(
            f"a picture of {height}x{width} pixels is too narrow: its longer side may be {MAX_RATIO} times the other; crop it"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > most:
        shrink = math.sqrt((height * width) / most)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def sampled_frames(count: int, fps: float, spec: Vision) -> tuple[list[int], float]:
    """Which of a clip's `count` frames are taken, and how many seconds one temporal patch of them lasts.

    As `Qwen2VLVideoProcessor.sample_frames` at `clip_fps`; a single frame, which that cannot sample, is taken as it is.

    Raises:
        RequestError: all frames are taken, and they are too many.
    """
    if spec.clip_fps is None:
        if count > spec.max_frames:
            raise RequestError(f"the clip has {count} frames, the limit is {spec.max_frames}; cut it or take every other one")
        taken = list(range(count))
    else:
        even = spec.temporal_patch
        most = min(spec.max_frames, count) // even * even
        wanted = min(max(count / fps * spec.clip_fps, spec.min_frames), most, count)
        number = max(1, math.floor(wanted / even) * even)
        taken = [index * count // number for index in range(number)]
    return taken, spec.temporal_patch / (len(taken) / count * fps)


def picture_frames(picture: Picture, spec: Vision) -> Frames:
    """A picture, resized: `[1, h, w, 3]`. Raises RequestError."""
    return _resized([picture], spec, spec.image_pixels)


def clip_frames(clip: Clip, spec: Vision) -> tuple[Frames, float]:
    """A clip's frames that are taken, resized, `[F, h, w, 3]`, and the seconds a temporal patch of them lasts.

    Raises:
        RequestError: as :func:`sampled_frames`, or a frame is too large or too narrow.
    """
    taken, seconds = sampled_frames(len(clip.frames), clip.fps, spec)
    return _resized(clip.frames[taken], spec, spec.clip_pixels), seconds


def patches(frames: Frames, spec: Vision) -> NDArray[np.float32]:
    """What the tower reads: f32 `[n, merge * merge, 3 * temporal_patch * patch * patch]`, a token's patches side by side.

    Flattened to patches, these are the processors' `pixel_values`: tokens by time, row and column; a patch's values by channel,
    frame, row and column.
    """
    size, merge, depth = spec.patch, spec.merge, spec.temporal_patch
    missing = -len(frames) % depth
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)]) if missing else frames
    times, rows, columns = len(frames) // depth, frames.shape[1] // spec.factor, frames.shape[2] // spec.factor
    cut = frames.reshape(times, depth, rows, merge, size, columns, merge, size, 3)
    cut = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, row, column, their patches; channel, frame, row, column in the patch
    cut = cut.reshape(times * rows * columns, merge**2, 3, depth * size * size)
    # A byte has 256 values: the processors' float64 product and float32 quotient are looked up, not computed.
    table = _normalized_bytes(spec)
    values = np.empty(cut.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], cut[:, :, channel], out=values[:, :, channel])
    return values.reshape(*cut.shape[:2], spec.patch_values)


def _normalized_bytes(spec: Vision) -> NDArray[np.float32]:
    """f32 `[3, 256]`: every byte of each channel, rescaled to [0, 1] and normalised."""
    unit = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None] for values in (spec.mean, spec.std))
    scaled: NDArray[np.float32] = (unit[None] - mean) / std
    return scaled


def _resized(pictures: Iterable[Picture], spec: Vision, pixels: tuple[int, int]) -> Frames:
    from PIL import Image

    images = [_rgb(picture) for picture in pictures]
    width, height = images[0].size
    rows, columns = resized_size(height, width, spec.factor, *pixels)
    return np.stack([np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)) for image in images])


def _rgb(picture: Picture) -> Image.Image:
    """The picture as 8-bit RGB. Raises RequestError where it is none."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        image = picture if picture.mode == "RGB" else picture.convert("RGB")
    else:
        array = np.asarray(picture)
        if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
            raise RequestError(f"a picture must be [height, width, 3], got {list(array.shape)}; convert it to RGB")
        if array.dtype != np.uint8:
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise RequestError(f"a picture must be bytes, or finite floats in [0, 1], got {array.dtype}")
            array = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
        image = Image.fromarray(array)
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(f"a picture has {image.height}x{image.width} pixels, more than {MAX_PIXELS}; resize it")
    return image
