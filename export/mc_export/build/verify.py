"""A built engine against the torch module it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_export.program.base import Extents, Program
from mc_runtime.backends.base import Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.manifest import Engine, MeasuredError, Precision
from mc_runtime.errors import EngineError

# Relative L2 error of any output. Float32 engines only reorder sums. The others are what such engines show on random weights,
# with room; whether pictures keep their quality is measured on pictures.
TOLERANCE = {Precision.FP32: 2e-4, Precision.BF16: 5e-2, Precision.INT8: 2e-1}
# The norm an output of n numbers is compared with is at least this times sqrt(n): one that is zero by design stays near it.
_RMS_FLOOR = 1e-3


def verify_engine(
    program: Program, spec: Engine, files: Sequence[Path], shapes: Iterable[Extents], tolerance: float | None = None
) -> MeasuredError:
    """Runs engine and module on the same inputs at each of `shapes`.

    Args:
        program: the torch module.
        spec: the engine as the manifest will have it.
        files: its files, the one to load first.
        shapes: sizes of the dynamic dimensions.
        tolerance: largest relative L2 error of any output; the precision's own by default.

    Returns:
        The largest errors over all shapes and outputs.

    Raises:
        EngineError: an output has another shape, is not finite, or its error exceeds the tolerance; the message says the mend.
    """
    limit = TOLERANCE[spec.precision] if tolerance is None else tolerance
    engine = create_backend(spec.target, Settings())
    loaded = engine.load(program.component, tuple(files), spec)
    worst = MeasuredError(max_abs=0.0, relative_l2=0.0)
    for seed, extents in enumerate(shapes):
        inputs = program.example(extents, seed=seed + 10)
        expected = {name: tensor.numpy() for name, tensor in program.run(inputs).items()}
        results = loaded.run({name: engine.to_device(tensor.numpy()) for name, tensor in inputs.items()})
        for name, reference in expected.items():
            error = measure(engine.to_host(results[name]), reference, f"{program.component}: {name} at {_said(extents)}")
            worst = MeasuredError(
                max_abs=max(worst.max_abs, error.max_abs), relative_l2=max(worst.relative_l2, error.relative_l2),
                shapes=worst.shapes,
            )  # fmt: skip
        worst = replace(worst, shapes=(*worst.shapes, dict(extents)))
    if not worst.relative_l2 <= limit:
        mend = "keep it in fp32" if spec.precision is not Precision.FP32 else "this is a fault of the exporter; report it"
        raise EngineError(
            f"{program.component}: {spec.target} {spec.precision} is off by {worst.relative_l2:.2g} (relative L2; largest "
            f"difference {worst.max_abs:.2g}), more than {limit:g}; {mend}"
            + (f" with --engine {program.component}={spec.target}:fp32" if spec.precision is not Precision.FP32 else "")
        )
    return worst


def measure(result: NDArray[np.float32], reference: NDArray[np.float32], where: str) -> MeasuredError:
    """The error of one output.

    Raises:
        EngineError: the shapes differ, or a number is not finite.
    """
    if result.shape != reference.shape:
        raise EngineError(f"{where}: the engine gives {result.shape}, its module {reference.shape}; a size was baked in")
    if not np.isfinite(result).all():
        raise EngineError(f"{where}: the engine gives numbers that are not finite; build it in another precision")
    difference = result.astype(np.float64) - reference
    norm = max(float(np.linalg.norm(reference)), _RMS_FLOOR * reference.size**0.5)
    return MeasuredError(max_abs=float(np.abs(difference).max()), relative_l2=float(np.linalg.norm(difference)) / norm)


def _said(extents: Extents) -> str:
    return ", ".join(f"{name}={size}" for name, size in extents.items())
