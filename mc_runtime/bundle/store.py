"""Bundles on disk: written with every file's hash, read only after the hashes agree."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mc_runtime.bundle.manifest import MANIFEST_FILE, File, Manifest, manifest_from_json, manifest_to_json
from mc_runtime.errors import BundleError, shown

# A manifest takes some kilobytes; what is larger than this is something else, and would fill the memory.
_LARGEST_MANIFEST = 16 * 2**20
_MEND = "copy it again or build it again with `mc-runtime build`"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; `digest` is the sha256 of the manifest and so of everything in it."""

    path: Path
    manifest: Manifest
    digest: str

    def file(self, name: str) -> Path:
        """The path of a file that the manifest names."""
        return self.path / name

    def verify(self, names: Iterable[str] | None = None, *, hashes: bool = True) -> None:
        """Check files (all of them by default) for presence, size and, unless `hashes` is False, sha256.

        Raises BundleError naming the first file that is wrong and what to do.
        """
        listed = self.manifest.files
        wanted = {name: listed[name] for name in (listed if names is None else names)}
        for name, file in wanted.items():
            _check_size(self.path / name, file)
        if hashes:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                found = pool.map(lambda name: sha256_of(self.path / name), wanted)
                for (name, file), digest in zip(wanted.items(), found, strict=True):
                    if digest != file.sha256:
                        raise BundleError(f"{self.path / name}: altered (sha256 differs from the manifest's); {_MEND}")


def open_bundle(path: str | Path) -> Bundle:
    """Read and validate a bundle's manifest; no other file is touched. Raises BundleError."""
    if not isinstance(path, (str, os.PathLike)):
        raise BundleError(f"a bundle is named by its directory, got {shown(path)}")
    directory = Path(path)
    if "\0" in str(path):
        raise BundleError(f"{str(path)!r}: no such bundle; make one with `mc-runtime build CHECKPOINT -o BUNDLE`")
    manifest_path = directory / MANIFEST_FILE
    try:
        if manifest_path.stat().st_size > _LARGEST_MANIFEST or not manifest_path.is_file():
            raise BundleError(f"{manifest_path}: too large for a manifest, or not a file; {_MEND}")
        text = manifest_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json, so it is not a bundle" if directory.is_dir() else "no such bundle"
        raise BundleError(f"{directory}: {what}; make one with `mc-runtime build CHECKPOINT -o BUNDLE`") from None
    except OSError as error:
        raise BundleError(f"{manifest_path}: cannot be read ({error.strerror}); {_MEND}") from None
    return Bundle(directory, manifest_from_json(text, manifest_path), hashlib.sha256(text).hexdigest())


def describe_files(directory: str | Path) -> dict[str, File]:
    """Size and sha256 of every file under a directory but its manifest, by relative path."""
    root = Path(directory)
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix() for path in paths]
    return {
        name: File(sha256=sha256_of(path), bytes=path.stat().st_size)
        for name, path in zip(names, paths, strict=True)
        if name != MANIFEST_FILE
    }


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a directory, last of all its files."""
    (Path(directory) / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes, read in a stream."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from None


def _check_size(path: Path, file: File) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise BundleError(f"{path}: missing; {_MEND}") from None
    if not path.is_file():  # reading a pipe would never end
        raise BundleError(f"{path}: not a file; {_MEND}")
    if found != file.bytes:
        raise BundleError(f"{path}: {found} bytes where the manifest says {file.bytes}; {_MEND}")
