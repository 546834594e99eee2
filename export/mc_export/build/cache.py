"""The engine cache: built files under a key of everything they were made from, never found by name alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import mc_export
import mc_kernels
from mc_runtime.bundle.atomic import staged_directory, sweep
from mc_runtime.cache import cache_root
from mc_runtime.errors import OutputError
from mc_runtime.machine import this_machine

ENTRY_FILE = "entry.json"
_MEND = " (this is the cache: MC_RUNTIME_CACHE may name another folder for it)"
_LIBRARIES = (
    "diffusers", "nncf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "openvino", "peft", "torch", "transformers",
    "triton",
)  # fmt: skip


class CacheEntry(NamedTuple):
    """A finished entry: its directory, its files by name with their sha256, and what was noted of it."""

    directory: Path
    files: dict[str, str]
    notes: dict[str, Any]


def content_key(facts: Mapping[str, Any]) -> str:
    """The key of something made from `facts`, by our sources and the installed libraries, on this kind of machine."""
    here = this_machine()
    everything = {
        "facts": facts,
        "sources": source_version(),
        "libraries": library_versions(),
        "machine": [here.arch, here.os, sorted(here.features)],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()


@cache
def source_version() -> str:
    """A sha256 over our sources: whatever of them is loaded, calibrated with or traced decides what an engine computes."""
    digest = hashlib.sha256()
    for package in (mc_export, mc_kernels):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}".encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries an engine passes through."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def lookup(key: str) -> CacheEntry | None:
    """The entry of `key`, or None. An entry whose files are not what it says is removed."""
    directory = _directory(key)
    try:
        entry = json.loads((directory / ENTRY_FILE).read_text(encoding="utf-8"))
        files: dict[str, str] = entry["files"]
        if all(_sha256(directory / name) == digest for name, digest in files.items()):
            return CacheEntry(directory, files, entry["notes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
    return None


def build_entry(key: str, make: Callable[[Path], Mapping[str, Any]]) -> CacheEntry:
    """Lets `make` fill a directory and keeps it under `key`, whole or not at all; `make` returns the entry's notes.

    Raises:
        OutputError: the cache cannot be written, or the disk is full.
    """
    directory = _directory(key)
    try:
        with staged_directory(directory) as stage:
            notes = dict(make(stage))
            files = {path.relative_to(stage).as_posix(): _sha256(path) for path in _files(stage)}
            (stage / ENTRY_FILE).write_text(json.dumps({"files": files, "notes": notes}, sort_keys=True), encoding="utf-8")
    except OutputError as error:
        if _MEND in str(error):  # of an entry that this one is made of
            raise
        raise OutputError(f"{error}{_MEND}") from error
    return CacheEntry(directory, files, notes)


def sweep_cache() -> None:
    """Removes what killed builds left: entries in the making that nobody is making."""
    for shelf in (cache_root() / "engines").glob("*"):
        sweep(shelf)


def copy_files(entry: CacheEntry, destination: Path) -> None:
    """Copies an entry's files; never links, so that nothing done to the copy reaches the cache."""
    for name in entry.files:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.directory / name, target)


def _directory(key: str) -> Path:
    return cache_root() / "engines" / key[:2] / key


def _files(directory: Path) -> Iterable[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
