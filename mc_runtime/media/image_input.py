"""Pictures in: a path, bytes, a Pillow image or an array becomes an upright RGB image, or one clear error."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media.files import read_bytes
from mc_runtime.media.kinds import HEAD, Kind, gif_is_whole, kind_of, webp_is_whole
from mc_runtime.media.limits import ImageLimits

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
_ORIENTATION = 0x0112
_CORRUPT_EXIF = "Corrupt EXIF"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")


def load_image(source: ImageSource, *, limits: ImageLimits | None = None) -> Image.Image:
    """An RGB image of its own: upright (EXIF orientation), on white where it was transparent, 8 bits a channel.

    Args:
        source: a file's path, a file's bytes, a Pillow image, or an array `[h, w]`, `[h, w, 1]`, `[h, w, 3]` or `[h, w, 4]`
            (uint8, uint16 or float in [0, 1]). PNG, JPEG, WebP and GIF are told apart by their content, whatever the name
            says; of an animation the first frame is taken.
        limits: of bytes and pixels.

    16-bit values are scaled, not clipped. Embedded colour profiles are not applied, as in diffusers' `load_image`.

    Raises:
        RequestError: the file cannot be read, is broken or cut, is of another format, or passes a limit; names the file.
    """
    limits = limits or ImageLimits()
    if isinstance(source, np.ndarray):
        return image_from_array(source, limits)
    name = "the image"
    try:
        if isinstance(source, Image.Image):
            check_pixels(source, name, limits.pixels)
            return upright_rgb(source)
        if isinstance(source, bytes):
            content = source
            if len(content) > limits.bytes:
                raise RequestError(f"{name}: {len(content)} bytes are over the limit of {limits.bytes}; make it smaller")
        elif isinstance(source, (str, os.PathLike)):
            name = os.fspath(source)
            content = read_bytes(Path(source), limits.bytes)
        else:
            raise RequestError(f"an image is a path, bytes, a Pillow image or an array, got {type(source).__name__}")
        with open_image(content, name, limits.pixels) as image:
            return upright_rgb(image)
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them into
        raise broken(name, error) from error


def open_image(content: bytes, name: str, pixels: int) -> Image.Image:
    """A picture or an animation, opened and not yet unpacked. Raises RequestError, and what Pillow raises."""
    kind = kind_of(content[:HEAD])
    if kind is None or kind.needs_pyav:
        mend = "give it as a video" if kind else "give PNG, JPEG, WebP or GIF"
        raise RequestError(f"{name}: {f'is a video ({kind.value})' if kind else 'no picture format that is read'}; {mend}")
    if (kind is Kind.GIF and not gif_is_whole(content)) or (kind is Kind.WEBP and not webp_is_whole(content)):
        raise broken(name, "the file ends early")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower, and an error
        warnings.filterwarnings("ignore", message=_CORRUPT_EXIF)
        try:
            image = Image.open(BytesIO(content), formats=(kind.name,))
        except Image.DecompressionBombError:
            raise RequestError(f"{name}: more pixels than the limit of {pixels}; make it smaller") from None
    check_pixels(image, name, pixels)
    return image


def check_pixels(image: Image.Image, name: str, pixels: int) -> None:
    """Raises RequestError for an empty image, and for more than `pixels`."""
    if not image.width or not image.height:
        raise RequestError(f"{name}: a picture of {image.width}x{image.height} pixels is empty; give another")
    if image.width * image.height > pixels:
        raise RequestError(f"{name}: {image.width}x{image.height} pixels are over the limit of {pixels}; make it smaller")


def broken(name: str, error: object) -> RequestError:
    """The one error of a damaged file."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return RequestError(f"{name}: broken or cut off ({reason}); copy it again")


def upright_rgb(image: Image.Image) -> Image.Image:
    """A new RGB image: turned as EXIF says, flattened on white, scaled to 8 bits. The given one stays as it is."""
    turn = _TURNS.get(_orientation(image))
    result = rgb(image)
    if turn is not None:
        result = result.transpose(turn)
    if result is image:
        result = image.copy()
    result.info = {}  # what was said of the file (its transparency, its EXIF) does not hold for this image
    return result


def rgb(image: Image.Image) -> Image.Image:
    """`image` with the pixels it shows, as RGB. Raises RequestError for a mode whose range is not known."""
    image.load()  # a palette, and what of it is transparent, is known only now
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise RequestError("an image of mode F has no known range; give an array of floats in [0, 1]")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        return _on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def image_from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    """An RGB image of `[h, w]` or `[h, w, 1 | 3 | 4]`, uint8, uint16 or float in [0, 1]. Raises RequestError."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise RequestError(f"an image array is [h, w], [h, w, 3] or [h, w, 4], got shape {list(array.shape)}")
    if array.shape[0] * array.shape[1] > limits.pixels:
        raise RequestError(f"an array of {array.shape[1]}x{array.shape[0]} pixels is over the limit of {limits.pixels}")
    array = bytes_from_array(array)
    image = Image.fromarray(np.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array))
    return _on_white(image) if array.shape[2] == 4 else image


def bytes_from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 as it is, uint16 by its range, floats from [0, 1]: the nearest byte. Raises RequestError for others."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return _scaled_16_bits(array)
    if array.dtype.kind != "f":
        raise RequestError(f"an array of pixels is uint8, uint16 or float in [0, 1], got {array.dtype}")
    if not (np.isfinite(array).all() and array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
        raise RequestError("an array of float pixels lies in [0, 1]; divide bytes by 255, or give them as uint8")
    nearest: NDArray[np.uint8] = np.rint(array * np.asarray(255, array.dtype)).astype(np.uint8)
    return nearest


def _from_16_bits(image: Image.Image) -> Image.Image:
    """RGB of a greyscale image of 16-bit values, which Pillow keeps in modes I;16 and I."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise RequestError("an image of mode I holds values from 0 to 65535 (16 bits); convert it to RGB first")
    grey = _scaled_16_bits(values)
    if "transparency" in image.info:  # PNG names one value that is transparent
        grey = np.where(values == image.info["transparency"], 255, grey).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _scaled_16_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(values / 257).astype(np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    """What an RGBA image shows on white."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    white.alpha_composite(image)
    return white.convert("RGB")


def _orientation(image: Image.Image) -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_CORRUPT_EXIF)
        try:
            return int(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # damaged EXIF says nothing, and the picture is whole
            return 1
