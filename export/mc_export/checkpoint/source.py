"""Where checkpoints come from, and reading their JSON files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mc_export.checkpoint import layout
from mc_runtime.errors import CheckpointError


def local_folder(source: str | Path) -> Path:
    """A folder as it is; a hub id's files, fetched.

    Raises:
        CheckpointError: neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    text = str(source)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        raise CheckpointError(f"{text}: no such folder (a hub id looks like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=list(layout.HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{text}: neither a folder here nor reachable as a hub id ({type(error).__name__})") from error


def read_json(file: Path) -> Any:
    """Reads a JSON object.

    Raises:
        CheckpointError: unreadable, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def is_finite(value: Any) -> bool:
    """Whether every number in a JSON value is; Python's reader takes NaN and Infinity, which JSON does not have."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
