"""Pixels to Pillow images, and images to files that say how they were made."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mc_runtime.errors import EngineError, OutputError

FORMATS: dict[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Pillow's name of each file suffix."""
METADATA_KEY = "mc-runtime"
LONGEST_TEXT = 4096
"""Characters kept of a text in the metadata, and fewer where all of it would not fit into EXIF's 64 KiB."""
_EXIF_ROOM = 60_000
_EXIF_DESCRIPTION, _EXIF_SOFTWARE = 0x010E, 0x0131
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
    if not np.isfinite(pixels).all():
        raise EngineError("the decoder gave pixels that are not finite; build the bundle again with a higher precision")
    bytes_ = np.rint(np.clip(pixels, 0, 1) * np.float32(255)).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in bytes_]


def save_image(image: Image.Image, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a picture in the format its suffix names; the file appears whole or not at all.

    Args:
        image: what to write.
        path: ends in .png, .jpg, .jpeg or .webp.
        metadata: what made the picture (prompt, seed, ...), as JSON values: a text chunk in PNG, EXIF's description in the
            others. The same picture and metadata give the same bytes.

    Raises:
        OutputError: the suffix is unknown, or the place cannot be written.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path}: no picture format that is known; end the name in one of {', '.join(FORMATS)}")
    try:
        content = _encoded(image, kind, metadata)
    except (OSError, ValueError) as error:  # WebP ends at 16383 pixels a side, JPEG at 65500
        raise OutputError(f"{path}: a picture of {image.width}x{image.height} pixels cannot be {kind} ({error})") from error
    _write_whole(path, content)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_image` wrote about a picture; empty where there is nothing of ours."""
    with Image.open(path) as image:
        texts = getattr(image, "text", {})
        text = texts.get(METADATA_KEY) or image.getexif().get(_EXIF_DESCRIPTION, "")
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _encoded(image: Image.Image, kind: str, metadata: Mapping[str, Any] | None) -> bytes:
    options = dict(_QUALITY[kind])
    if metadata:
        text = _metadata_text(metadata)
        if kind == "PNG":
            chunks = PngImagePlugin.PngInfo()
            chunks.add_itxt("Software", "mc-runtime")
            chunks.add_itxt(METADATA_KEY, text)
            options["pnginfo"] = chunks
        else:
            exif = Image.Exif()
            exif[_EXIF_DESCRIPTION], exif[_EXIF_SOFTWARE] = text, "mc-runtime"
            options["exif"] = exif
    buffer = BytesIO()
    (image if kind == "PNG" else image.convert("RGB")).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    """JSON in ASCII, which every reader of EXIF understands."""
    longest = LONGEST_TEXT
    while True:
        short = {key: value[:longest] if isinstance(value, str) else value for key, value in metadata.items()}
        text = json.dumps(short, sort_keys=True, default=str)
        if len(text) <= _EXIF_ROOM or not longest:
            return text
        longest //= 2  # a character outside the Latin alphabets takes up to twelve bytes


def _write_whole(path: Path, content: bytes) -> None:
    """Writes beside the place and moves it there, so that nobody ever sees half a picture."""
    unfinished = path.with_name(f".mc-runtime.{secrets.token_hex(8)}.part")  # a name that is never too long
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a directory; name a file in it")
        if path.exists() and not os.access(path, os.W_OK):
            raise OutputError(f"{path}: not writable; choose another place or change its permissions")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"{path}: cannot be written ({reason}); choose another place") from error
    finally:
        with suppress(OSError):  # where the place itself is broken, the caller is told of that
            unfinished.unlink(missing_ok=True)
