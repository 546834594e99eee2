"""Clips to files that say how they were made: MP4, WebM, GIF, animated WebP, or a folder of PNGs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from mc_runtime.errors import OutputError
from mc_runtime.media.clip import Clip
from mc_runtime.media.files import whole_file, write_whole
from mc_runtime.media.images import encoded_image
from mc_runtime.media.metadata import exif_with, metadata_text
from mc_runtime.media.palette import paletted

CLIP_FORMATS = (".mp4", ".webm", ".gif", ".webp")
"""File suffixes a clip is written with; a name without one is a folder of PNGs."""
_WEBP_QUALITY: dict[str, Any] = {"quality": 90, "method": 4}
FASTEST_GIF = 50
"""Frames a second: viewers slow a GIF down whose frames are shorter than 20 ms."""
_FRAME_NAME = re.compile(r"\d{4,}\.png")


def save_clip(clip: Clip, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a clip in the format its suffix names; it appears whole or not at all.

    Args:
        clip: what to write.
        path: ends in .mp4 (H.264, or MPEG-4 where PyAV has no x264), .webm (VP9), .gif or .webp; or names a folder, new or
            holding nothing but frames, for 0000.png, 0001.png and so on. MP4 and WebM need PyAV. Their sides are even: an
            odd one is padded by repeating its last row or column.
        metadata: what made the clip, as JSON values: the comment of MP4, WebM and GIF, EXIF's description in WebP, a text
            chunk in every PNG; nothing is written without. The same clip and metadata give the same bytes.

    Raises:
        OutputError: the suffix is unknown, the place cannot be written, or the format cannot hold such a clip.
        RequestError: PyAV is needed and not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in CLIP_FORMATS:
        known = ", ".join(CLIP_FORMATS)
        raise OutputError(f"{path}: no clip format that is known; end the name in one of {known}, or in none for a folder")
    text = metadata_text(metadata) if metadata else None
    if not suffix:
        _write_folder(clip, path, metadata)
    elif suffix in (".mp4", ".webm"):
        from mc_runtime.media.pyav import encode_video

        with whole_file(path) as unfinished:
            encode_video(clip, unfinished, suffix, text)
    else:
        try:
            content = _gif(clip, path, text) if suffix == ".gif" else _webp(clip, text)
        except (OSError, ValueError, RuntimeError) as error:  # WebP ends at 16383 pixels a side, GIF at 65535
            height, width = clip.size
            raise OutputError(f"{path}: a clip of {width}x{height} pixels cannot be {suffix[1:]} ({error})") from error
        write_whole(path, content)


def _gif(clip: Clip, path: Path, text: str | None) -> bytes:
    if clip.fps > FASTEST_GIF:
        raise OutputError(f"{path}: a GIF shows at most {FASTEST_GIF} frames a second, not {clip.fps:g}; write .webp or .mp4")
    first, *others = paletted(clip.frames)
    options: dict[str, Any] = {"comment": text.encode("ascii")} if text else {}
    buffer = BytesIO()
    first.save(
        buffer, "GIF", save_all=True, append_images=others, duration=_durations(clip, 10), loop=0, optimize=False, **options
    )
    return buffer.getvalue()


def _webp(clip: Clip, text: str | None) -> bytes:
    first, *others = clip.images
    options: dict[str, Any] = {"exif": exif_with(text)} if text else {}
    buffer = BytesIO()
    first.save(
        buffer, "WEBP", save_all=True, append_images=others, duration=_durations(clip, 1), loop=0, **_WEBP_QUALITY, **options
    )
    return buffer.getvalue()


def _durations(clip: Clip, unit: int) -> list[int]:
    """Milliseconds of every frame, in whole `unit`s; what is rounded off one is made up for by the next."""
    times = [unit * round(1000 * index / (clip.fps * unit)) for index in range(len(clip) + 1)]
    return [after - before for before, after in pairwise(times)]


def _write_folder(clip: Clip, path: Path, metadata: Mapping[str, Any] | None) -> None:
    """PNGs named by their number, in a folder that appears whole. One that holds anything else is left alone."""
    try:
        foreign = [entry.name for entry in path.iterdir() if not _FRAME_NAME.fullmatch(entry.name)] if path.is_dir() else []
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror}); choose another folder") from error
    if foreign:
        raise OutputError(f"{path}: holds other files ({min(foreign)}); name an empty or new folder")
    from mc_runtime.bundle.atomic import staged_directory

    with staged_directory(path) as stage:
        for index, image in enumerate(clip.images):
            (stage / f"{index:04}.png").write_bytes(encoded_image(image, "PNG", metadata))
