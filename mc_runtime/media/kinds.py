"""What a media file is, by its content and never by its name, and whether all of it is there."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import BinaryIO

from mc_runtime.errors import RequestError

HEAD = 64
"""Bytes of a file that `kind_of` looks at."""
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_EBML = 0x1A45DFA3


class Kind(Enum):
    """The formats that are read. The value is the name that errors use."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WebP"
    GIF = "GIF"
    MP4 = "MP4"
    """MP4 and its parent, QuickTime's MOV."""
    MATROSKA = "WebM"
    """WebM and its parent, Matroska."""

    @property
    def needs_pyav(self) -> bool:
        """Whether reading it takes PyAV; Pillow reads the others."""
        return self in (Kind.MP4, Kind.MATROSKA)


def kind_of(head: bytes) -> Kind | None:
    """The format of a file that begins with `head`, or None where it is none that is read."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return Kind.PNG
    if head.startswith(b"\xff\xd8\xff"):
        return Kind.JPEG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Kind.WEBP
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return Kind.GIF
    if head[4:8] in _MP4_BOXES:
        return Kind.MP4
    if head.startswith(_EBML.to_bytes(4, "big")):
        return Kind.MATROSKA
    return None


def kind_of_file(path: Path) -> Kind | None:
    """`kind_of` for a file that is known to be readable. Raises RequestError where it is not after all."""
    try:
        with path.open("rb") as stream:
            return kind_of(stream.read(HEAD))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); check the disk") from error


def gif_is_whole(content: bytes) -> bool:
    """Whether a GIF's blocks lead to its trailer; Pillow takes a file that ends early for a shorter animation."""
    at = 13 + _colour_table(content, 10)
    while at < len(content):
        block = content[at]
        if block == 0x3B:
            return True
        if block == 0x21:  # an extension: its label, then sub-blocks
            at += 2
        elif block == 0x2C:  # an image: its descriptor, its colours, the size of a code, then sub-blocks
            at += 10 + _colour_table(content, at + 9) + 1
        else:
            return False
        while at < len(content) and content[at]:
            at += 1 + content[at]
        at += 1
    return False


def _colour_table(content: bytes, at: int) -> int:
    """Bytes of the colour table that the flags at `at` announce."""
    flags = content[at] if at < len(content) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def webp_is_whole(content: bytes) -> bool:
    """Whether a WebP has as many bytes as its header says."""
    return len(content) >= 8 + int.from_bytes(content[4:8], "little")


def video_is_whole(stream: BinaryIO, size: int, kind: Kind) -> bool:
    """Whether every part at the top of an MP4 or WebM of `size` bytes ends within the file.

    FFmpeg plays what is there of a file that was cut and does not say so. A WebM whose recorder never wrote the length of
    its parts counts as whole.
    """
    part = _mp4_part if kind is Kind.MP4 else _matroska_part
    at = 0
    while at < size:
        stream.seek(at)
        length = part(stream.read(24))
        if length is None:
            return True
        if length <= 0:
            return False
        at += length
    return at == size


def _mp4_part(head: bytes) -> int | None:
    """Bytes of the box that begins with `head`; None for one that reaches to the end, 0 for what is no box."""
    if len(head) < 8:
        return 0
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        return int.from_bytes(head[8:16], "big")
    return None if length == 0 else length if length >= 8 else 0


def _matroska_part(head: bytes) -> int | None:
    """Bytes of the element that begins with `head`; None for one of unknown length, 0 for what is no element."""
    name = _length_of_number(head, 0)
    digits = _length_of_number(head, name)
    if not name or not digits or len(head) < name + digits:
        return 0
    length = int.from_bytes(head[name : name + digits], "big") & ((1 << 7 * digits) - 1)
    if length == (1 << 7 * digits) - 1:
        return None
    return name + digits + length


def _length_of_number(head: bytes, at: int) -> int:
    """Bytes of EBML's variable-length number at `at`: one more than its leading zero bits; 0 where there is none."""
    return 9 - head[at].bit_length() if at < len(head) and head[at] else 0
