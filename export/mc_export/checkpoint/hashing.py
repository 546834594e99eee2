"""Content hashes of checkpoints, so that an engine is rebuilt exactly when what it was made of changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 22


def sha256_of_files(root: Path, files: Iterable[Path]) -> str:
    """One sha256 over names (relative to ``root``) and contents, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + str(file.stat().st_size).encode() + b"\0")
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """One sha256 over every file below ``folder``; the empty string's where there is none."""
    return sha256_of_files(folder, (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else ())
