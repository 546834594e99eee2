"""One file a target: from an ONNX graph to the files its library loads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_export.lower.onnx import OnnxFile
from mc_runtime.bundle.manifest import Precision

Calibration = list[dict[str, NDArray[np.generic]]]
"""Inputs of one engine as real requests have them, by name; empty where nothing is quantized."""

_HOMES = {"onnxruntime": "mc_export.lower.onnxruntime", "openvino": "mc_export.lower.openvino"}


def lower(
    target: str, onnx: OnnxFile, component: str, precision: Precision, calibration: Calibration, directory: Path
) -> tuple[list[Path], dict[str, Any]]:
    """Makes `component`'s files for `target` in `directory`.

    Returns:
        The files, the one to load first, and the engine's options for the manifest.
    """
    made: tuple[list[Path], dict[str, Any]] = import_module(_HOMES[target]).engine_files(
        onnx, component, precision, calibration, directory
    )
    return made
