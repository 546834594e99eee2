"""Kernels that TensorRT for RTX compiles on the GPU at hand, kept from one process to the next."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mc_runtime.backends.trt_libraries import TrtLibrary


class KernelCache:
    """The library's runtime cache of one engine, and the file it is kept in.

    A file of another GPU, driver or version is not taken by the library and is replaced. Without a folder nothing is kept.

    Args:
        native: the library's cache, or None where it has none.
        path: the file, or None to keep nothing.
    """

    def __init__(self, native: Any | None, path: Path | None) -> None:
        self.native = native
        self._path = path
        self._kept = 0
        if native is not None and path is not None:
            try:
                kept = path.read_bytes()
                self._kept = len(kept) if native.deserialize(kept) else 0
            except OSError:
                self._kept = 0

    @classmethod
    def of(cls, library: TrtLibrary, engine: Any, folder: Path | None, component: str) -> KernelCache:
        """The cache of an engine, with what the file in `folder` holds."""
        native = engine.create_runtime_config().create_runtime_cache() if library.captures_graphs else None
        return cls(native, None if folder is None else folder / f"{library.target}-{component}.kernels")

    def save(self) -> None:
        """Write the file, whole or not at all, if there is more than it holds. A disk that refuses costs only time."""
        if self.native is None or self._path is None:
            return
        blob = bytes(memoryview(self.native.serialize()))
        if len(blob) == self._kept:
            return
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(blob)
            scratch.replace(self._path)
            self._kept = len(blob)
        except OSError:
            with suppress(OSError):
                scratch.unlink()
