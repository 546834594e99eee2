"""Where mc-runtime keeps what it can make again: built engines and the demo's bundle."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$MC_RUNTIME_CACHE`, else `$XDG_CACHE_HOME/mc-runtime`, else `~/.cache/mc-runtime`; it may not exist."""
    own = os.environ.get("MC_RUNTIME_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache").absolute() / "mc-runtime"


def size_on_disk(root: Path) -> int:
    """Bytes of all files under `root`, 0 where it does not exist; a file that vanishes meanwhile is left out."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118  # a Path each is slow
            except OSError:
                continue
    return total


def compiled_cache() -> Path | None:
    """Where engine libraries may keep what they compiled, made now; None where the cache cannot be written."""
    folder = cache_root() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
