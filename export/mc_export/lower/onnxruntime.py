"""Engine files for onnxruntime: the ONNX graph itself, or its quantized form."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mc_export.lower import Calibration
from mc_export.lower.onnx import OnnxFile
from mc_runtime.bundle.manifest import Precision


def engine_files(
    onnx: OnnxFile, component: str, precision: Precision, calibration: Calibration, directory: Path
) -> tuple[list[Path], dict[str, Any]]:
    """See :func:`mc_export.lower.lower`.

    An optimised graph is not stored: what onnxruntime fuses, and how it lays out weights, depends on the CPU that loads it.
    """
    if precision is Precision.INT8:
        from mc_export.quantize import quantize_onnxruntime

        options: dict[str, Any] = quantize_onnxruntime(onnx.path, directory / onnx.path.name, calibration, component)
        return sorted(directory.glob(f"{component}.onnx*")), options
    return [_same_file(file, directory / file.name) for file in onnx.files], {}


def _same_file(source: Path, target: Path) -> Path:
    """`source` under another name, without a copy where the file system allows it; neither is ever written to again."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
    return target
