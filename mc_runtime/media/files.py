"""Files in and out: read within a limit, and written so that they appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mc_runtime.errors import OutputError, RequestError


def check_readable(path: Path, limit: int) -> int:
    """The size in bytes of the file at `path`, which can be read and has at most `limit`. Raises RequestError."""
    try:
        if path.is_dir():
            raise RequestError(f"{path}: is a directory; name a file in it")
        if not path.exists():
            raise RequestError(f"{path}: no such file; check the name")
        if not path.is_file():  # a pipe or a device may never end
            raise RequestError(f"{path}: is no regular file; write it to one first")
        size = path.stat().st_size
        if not os.access(path, os.R_OK):
            raise RequestError(f"{path}: not readable; change its permissions")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{str(path)!r}: cannot be read ({_reason(error)}); check the name") from None
    if not size:
        raise RequestError(f"{path}: the file is empty; copy it again")
    if size > limit:
        raise RequestError(f"{path}: {size} bytes are over the limit of {limit}; make it smaller")
    return size


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises RequestError naming the file."""
    check_readable(path, limit)
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({_reason(error)}); check the disk") from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Whether a file, or with `folder` a directory, can be written at `path`, before the work is done. Raises OutputError."""
    try:
        place = _real(path)
        if not folder:
            _refuse_what_is_no_file(path)
        if not place.parent.is_dir():
            raise OutputError(f"{path}: there is no directory {place.parent}; make it first")
        # A file is written beside its place and moved there: its directory must take new files in any case.
        places = (place.parent, place) if place.exists() else (place.parent,)
    except OSError as error:  # the name is too long
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another name") from None
    if not all(os.access(one, os.W_OK) for one in places):
        raise OutputError(f"{path}: not writable; choose another place or change its permissions")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` only when the block ends without an error.

    A symbolic link stays one, and what it leads to is replaced.

    Raises OutputError where the place cannot be written, or the block raises OSError (a full disk).
    """
    place = _real(path)
    unfinished = place.with_name(f".mc-runtime.{secrets.token_hex(8)}.part")  # a name that is never too long
    try:
        _refuse_what_is_no_file(path)
        if place.exists() and not os.access(place, os.W_OK):
            raise OutputError(f"{path}: not writable; choose another place or change its permissions")
        yield unfinished
        unfinished.replace(place)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({_reason(error)}); choose another place") from error
    finally:
        with suppress(OSError):  # where the place itself is broken, the caller is told of that
            unfinished.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside the place and moves it there, so that nobody ever sees half a file. Raises OutputError."""
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def _real(path: Path) -> Path:
    """The place behind symbolic links. Raises OutputError."""
    try:
        return path.resolve()
    except RuntimeError:
        raise OutputError(f"{path}: its symbolic links go in circles; choose another name") from None


def _refuse_what_is_no_file(path: Path) -> None:
    """Raises OutputError where something is there that a file must not take the place of, as of `/dev/null`."""
    if path.is_dir():
        raise OutputError(f"{path}: is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a pipe or a device, which would be lost; name a file")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
