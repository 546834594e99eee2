"""What made a picture or a clip, kept inside its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media.files import check_readable, read_bytes
from mc_runtime.media.image_input import broken, open_image
from mc_runtime.media.kinds import kind_of_file
from mc_runtime.media.limits import ImageLimits

METADATA_KEY = "mc-runtime"
"""The text chunk of a PNG; the other formats have one place for a text, and no names."""
SOFTWARE = "mc-runtime"
LONGEST_TEXT = 4096
"""Characters kept of a text in the metadata, and fewer where all of it would not fit into EXIF's 64 KiB."""
_ROOM = 60_000
_EXIF_DESCRIPTION, _EXIF_SOFTWARE = 0x010E, 0x0131


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """JSON in ASCII, which every reader of EXIF understands."""
    longest = LONGEST_TEXT
    while True:
        short = {key: value[:longest] if isinstance(value, str) else value for key, value in metadata.items()}
        text = json.dumps(short, sort_keys=True, default=str)
        if len(text) <= _ROOM or not longest:
            return text
        longest //= 2  # a character outside the Latin alphabets takes up to twelve bytes


def exif_with(text: str) -> Image.Exif:
    """EXIF that holds a text, for JPEG and WebP."""
    exif = Image.Exif()
    exif[_EXIF_DESCRIPTION], exif[_EXIF_SOFTWARE] = text, SOFTWARE
    return exif


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What made a picture, a clip or a folder of frames; empty where there is nothing of ours.

    Raises RequestError: the file cannot be read, or is broken; or it is MP4 or WebM and PyAV is not installed.
    """
    place = Path(path)
    if place.is_dir():
        from mc_runtime.media.clip_folder import numbered_frames

        place = numbered_frames(place)[0]
    limits = ImageLimits()
    check_readable(place, 2**63)
    kind = kind_of_file(place)
    if kind is not None and kind.needs_pyav:
        from mc_runtime.media.pyav import video_comment

        return _parsed(video_comment(place, kind))
    try:
        with open_image(read_bytes(place, limits.bytes), str(place), limits.pixels) as image:
            texts = getattr(image, "text", {})
            comment = image.info.get("comment", b"")  # GIF's
            return _parsed(texts.get(METADATA_KEY) or image.getexif().get(_EXIF_DESCRIPTION) or comment)
    except RequestError:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file leads it into
        raise broken(str(place), error) from error


def _parsed(text: Any) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}
