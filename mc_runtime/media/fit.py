"""Pictures and clips brought to a model's size: the same numbers as diffusers' VaeImageProcessor and VideoProcessor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media.clip import Clip

FitMode = Literal["stretch", "crop"]
"""`stretch` (diffusers' "default") changes the proportions; `crop` keeps them and cuts what is over, evenly on both sides."""


LARGEST_INNER = 2**27
"""Pixels that a crop may resize to before it cuts; a picture of one row would take gigabytes."""


def fit(images: Image.Image | Sequence[Image.Image], size: tuple[int, int], mode: FitMode = "stretch") -> NDArray[np.float32]:
    """Pixels f32 `[B, h, w, 3]` in [0, 1] of RGB images, each resized by Lanczos to `size` (height, width) in pixels.

    Equals `VaeImageProcessor.preprocess` for Pillow images, before that maps to [-1, 1].

    Raises RequestError for a size below 1x1, no image, an image that is not RGB (`load_image` makes it so), or one too narrow
    to crop.
    """
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures:
        raise RequestError("there is no image to resize; give at least one")
    return np.stack([np.asarray(resized(picture, size, mode), np.float32) for picture in pictures]) / np.float32(255)


def fit_clip(clip: Clip, size: tuple[int, int], mode: FitMode = "stretch") -> NDArray[np.float32]:
    """Pixels f32 `[1, F, h, w, 3]` in [0, 1] of a clip, each frame as `fit` does it.

    Equals `VideoProcessor.preprocess_video` for a list of Pillow images, but for its order of axes and range.
    """
    return fit(clip.images, size, mode)[None]


def resized(image: Image.Image, size: tuple[int, int], mode: FitMode = "stretch") -> Image.Image:
    """One RGB image at `size` (height, width). Raises RequestError as `fit` does."""
    height, width = size
    if height < 1 or width < 1:
        raise RequestError(f"a size is at least 1x1 pixels, got {height}x{width}")
    if image.mode != "RGB":
        raise RequestError(f"an image to resize is RGB, got {image.mode}; load it with load_image")
    if mode == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    if mode != "crop":
        raise RequestError(f"a fit is 'stretch' or 'crop', got {mode!r}")
    wider = width * image.height > height * image.width
    inner_width = width if wider else image.width * height // image.height
    inner_height = image.height * width // image.width if wider else height
    if inner_width * inner_height > LARGEST_INNER:
        given = f"{image.width}x{image.height} pixels"
        raise RequestError(f"a picture of {given} is too narrow to crop to {width}x{height}; cut it first")
    inner = image.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
    result = Image.new("RGB", (width, height))
    result.paste(inner, (width // 2 - inner_width // 2, height // 2 - inner_height // 2))
    return result
