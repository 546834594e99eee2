"""Where mc-runtime keeps what it can make again: built engines and the demo's bundle."""

from __future__ import annotations

import os
from pathlib import Path

from mc_runtime.errors import OutputError


def cache_root() -> Path:
    """`$MC_RUNTIME_CACHE`, else `$XDG_CACHE_HOME/mc-runtime`, else `~/.cache/mc-runtime`; it may not exist.

    Raises OutputError where the user has no home directory.
    """
    own, shared = os.environ.get("MC_RUNTIME_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        return (Path(shared) if shared else Path.home() / ".cache").absolute() / "mc-runtime"
    except RuntimeError:  # a user without an entry in the system's list, as in some containers
        raise OutputError("there is no home directory for the cache; set MC_RUNTIME_CACHE to a folder") from None


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
    try:
        folder = cache_root() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, OutputError):
        return None
    return folder if os.access(folder, os.W_OK) else None
