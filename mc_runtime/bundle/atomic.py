"""Directories that appear whole or not at all.

`staged_directory` gives a hidden sibling of the destination to write into. Only when the block ends without
an error are its files flushed to disk and the directory put in the destination's place, in one step; after an
error or an interruption the destination is what it was before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from mc_runtime.errors import OutputError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
# Bytes; whoever wrote until the disk was full has left less.
_NOTHING_LEFT = 1 << 16


@contextmanager
def staged_directory(destination: str | Path, *, marker: str | None = None) -> Iterator[Path]:
    """A temporary directory that becomes `destination` when the block ends without an error.

    With `marker`, a destination that exists, is not empty and has no file of that name is refused: it is
    something else than what is about to be written, and would be lost.

    Raises OutputError: the place is not writable, is taken by something else, or the disk is full.
    """
    target = _real(Path(destination))
    try:
        _refuse_foreign(target, marker)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent.glob(f"{escape(_prefix(target))}*"))
        stage, lock = _locked_stage(target)
    except OSError as error:
        raise _as_output_error(error, target) or OutputError(f"{target}: cannot be written ({error})") from None
    try:
        yield stage
        _flush(stage)
        _put_in_place(stage, target)
    except Exception as error:
        typed = _as_output_error(error, target)
        if typed is None:
            raise
        raise typed from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, also one that a library wrapped in its own type, means that the disk is full."""
    return _says(error, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """Around libraries that write half a file on a full disk and stumble over it later: the error becomes the disk's."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free < _NOTHING_LEFT and not is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder, whatever they were about to write there."""
    _remove_stale(folder.glob(".*.staged-*"))


def _refuse_foreign(target: Path, marker: str | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: is a file; name a directory that does not exist yet")
    if marker and any(target.iterdir()) and not (target / marker).is_file():
        raise OutputError(f"{target}: holds other files (no {marker}); name an empty or new directory")


def _says(error: BaseException, *numbers: int) -> bool:
    """Whether an error has one of these numbers, or the system's words for one: libraries wrap errors in types of their own."""
    said = str(error).lower()
    return getattr(error, "errno", None) in numbers or any(os.strerror(number).lower() in said for number in numbers)


def _as_output_error(error: BaseException, target: Path) -> OutputError | None:
    if is_disk_full(error):
        free = shutil.disk_usage(next(parent for parent in (target, *target.parents) if parent.exists())).free
        return OutputError(f"{target}: the disk is full ({free / 2**20:.0f} MiB left); free some space and try again")
    if _says(error, errno.EFBIG):
        return OutputError(f"{target}: a file is larger than this process may write; raise the limit (`ulimit -f`)")
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return OutputError(f"{error.filename or target}: not writable; choose another place or change its permissions")
    return None


def _real(destination: Path) -> Path:
    """The absolute place behind symbolic links: a link stays one, and what it leads to is replaced."""
    try:
        return destination.resolve()
    except RuntimeError:
        raise OutputError(f"{destination}: its symbolic links go in circles; name another directory") from None


def _locked_stage(target: Path) -> tuple[Path, int]:
    """A new stage and its lock. Another process's sweep may take one between its making and its locking: then a next one."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
        try:
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stage.exists():
            return stage, lock
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.staged-"


def _remove_stale(stages: Iterable[Path]) -> None:
    """Remove those of the stages that nobody holds the lock of."""
    for stale in stages:
        try:
            handle = os.open(stale, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except OSError:
            pass  # another process is writing it
        finally:
            os.close(handle)


def _flush(directory: Path) -> None:
    """Force every file, and the names in every directory, onto the disk."""
    for folder, _, names in os.walk(directory):
        for path in (*(Path(folder, name) for name in names), Path(folder)):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _put_in_place(stage: Path, target: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    stage.chmod(0o777 & ~umask)  # mkdtemp makes it private
    try:
        stage.rename(target)
    except OSError as error:
        # A directory that is there and not empty: an old one, or another process's that was put there a moment ago.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(stage, target):
            _replace_in_two(stage, target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(stage: Path, target: Path) -> bool:
    """Swap both directories in one system call; False where the system or the file system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(stage), os.fsencode(target)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _replace_in_two(stage: Path, target: Path) -> None:
    """Rename the old directory away and the new one in; the old one comes back if the second rename fails."""
    old = stage.with_name(stage.name + ".old")
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
