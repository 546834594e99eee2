"""Pixels to Pillow images, and images to files that say how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mc_runtime.errors import EngineError, OutputError
from mc_runtime.media.files import write_whole
from mc_runtime.media.metadata import METADATA_KEY, SOFTWARE, exif_with, metadata_text

FORMATS: dict[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of each file suffix."""
_QUALITY: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 6},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95, "method": 4},
}


def pixels_to_images(pixels: NDArray[np.float32]) -> list[Image.Image]:
    """RGB images of `pixels` f32 `[B, h, w, 3]` in [0, 1]; a byte is the nearest one (a tie goes to the even one).

    Raises:
        EngineError: a pixel is not finite.
    """
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in pixels_to_bytes(pixels)]


def pixels_to_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest bytes of pixels in [0, 1], of any shape. Raises EngineError where one is not finite."""
    if not np.isfinite(pixels).all():
        raise EngineError("the decoder gave pixels that are not finite; build the bundle again with a higher precision")
    nearest: NDArray[np.uint8] = np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)
    return nearest


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a picture in the format its suffix names; the file appears whole or not at all.

    Args:
        image: what to write.
        path: ends in .png, .jpg, .jpeg or .webp.
        metadata: what made the picture (prompt, seed, ...), as JSON values: a text chunk in PNG, EXIF's description in the
            others; nothing is written without. The same picture and metadata give the same bytes.

    Raises:
        OutputError: the suffix is unknown, or the place cannot be written.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path}: no picture format that is known; end the name in one of {', '.join(FORMATS)}")
    try:
        content = encoded_image(image, kind, metadata)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65500
        raise OutputError(f"{path}: a picture of {image.width}x{image.height} pixels cannot be {kind} ({error})") from error
    write_whole(path, content)


def encoded_image(image: Image.Image, kind: str, metadata: Mapping[str, Any] | None) -> bytes:
    """A picture file's bytes, in the format that Pillow calls `kind`."""
    options = dict(_QUALITY[kind])
    if metadata:
        text = metadata_text(metadata)
        if kind == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt("Software", SOFTWARE)
            chunks.add_itxt(METADATA_KEY, text)
            options["pnginfo"] = chunks
        else:
            options["exif"] = exif_with(text)
    buffer = BytesIO()
    (image if kind == "PNG" else image.convert("RGB")).save(buffer, format=kind, **options)
    return buffer.getvalue()
