"""Named arrays in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mc_runtime.errors import BundleError


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file; equal arrays give equal bytes."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(path), metadata)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file. Raises BundleError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(str(path)))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BundleError(f"{path}: damaged ({error}); build the bundle again with `mc-runtime build`") from None
