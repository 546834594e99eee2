"""One file a target: from an ONNX graph, or from the torch program itself, to the files its library loads."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_export.lower.onnx import OnnxFile
from mc_export.program.base import Program
from mc_runtime.bundle.manifest import Precision

Calibration = list[dict[str, NDArray[np.generic]]]
"""Inputs of one engine as real requests have them, by name; empty where nothing is quantized."""

_HOMES = {"onnxruntime": "mc_export.lower.onnxruntime", "openvino": "mc_export.lower.openvino"}
_PROGRAM_HOMES = {"inductor": "mc_export.lower.inductor", "inductor-cuda": "mc_export.lower.inductor_cuda"}


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


def takes_programs(target: str) -> bool:
    """Whether a target is lowered from the torch program, without an ONNX graph in between."""
    return target in _PROGRAM_HOMES


def target_facts(target: str, precision: Precision) -> dict[str, Any]:
    """What an engine of a target depends on besides its program, our exporter and the libraries: a GPU, say.

    Raises:
        EngineError: the target needs what this machine lacks; better known before weights are loaded.
    """
    if not takes_programs(target):
        return {}
    facts: dict[str, Any] = import_module(_PROGRAM_HOMES[target]).cache_facts(precision)
    return facts


def lower_program(target: str, program: Program, precision: Precision, directory: Path) -> tuple[list[Path], dict[str, Any]]:
    """As :func:`lower`, for a target that takes programs; a precision below fp32 may change the program's weights."""
    made: tuple[list[Path], dict[str, Any]] = import_module(_PROGRAM_HOMES[target]).engine_files(program, precision, directory)
    return made
