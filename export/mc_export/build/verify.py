"""A built engine against the torch module it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import hypot
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_export.build.options import BY_LAYER
from mc_export.lower import Calibration
from mc_export.program.base import Program
from mc_runtime.backends.base import Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.manifest import Engine, MeasuredError, Precision
from mc_runtime.errors import BundleError, EngineError

# Relative L2 error of any output. Float32 engines only reorder sums. The others are what such engines show on random weights,
# with room; whether pictures keep their quality is measured on pictures.
TOLERANCE = {Precision.FP32: 2e-4, Precision.FP16: 1e-2, Precision.BF16: 5e-2, Precision.INT8: 2e-1}
# An engine of fp8 or int4 layers may lose what its layers were chosen to lose and what bf16 does, with so much room.
_ROOM = 1.25
# The norm an output of n numbers is compared with is at least this times sqrt(n): one that is zero by design stays near it.
_RMS_FLOOR = 1e-3
# Real requests a quantized engine is verified on.
_VERIFIED_FEEDS = 4


def verify_engine(
    program: Program,
    spec: Engine,
    files: Sequence[Path],
    feeds: Iterable[Mapping[str, Tensor]],
    *,
    also_finite: Iterable[Mapping[str, Tensor]] = (),
    tolerance: float | None = None,
) -> MeasuredError:
    """Runs engine and module on the same inputs.

    Args:
        program: the torch module.
        spec: the engine as the manifest will have it.
        files: its files, the one to load first.
        feeds: inputs, of several shapes.
        also_finite: inputs, of further shapes, at which the results need only be finite and of the right shapes: random ones
            say nothing of an engine that was calibrated on real ones.
        tolerance: largest relative L2 error of any output; the precision's own by default.

    Returns:
        The largest errors over all feeds and outputs.

    Raises:
        EngineError: an output has another shape, is not finite, or its error exceeds the tolerance; the message says the mend.
    """
    backend = create_backend(spec.target, Settings())
    engine = backend.load(program.component, tuple(files), spec)

    def error_on(feed: Mapping[str, Tensor]) -> MeasuredError:
        results = engine.run({name: backend.to_device(tensor.numpy()) for name, tensor in feed.items()})
        return _compared(program, feed, {name: backend.to_host(buffer) for name, buffer in results.items()})

    for feed in also_finite:
        error_on(feed)
    return _judged(program.component, spec, [error_on(feed) for feed in feeds], tolerance)


def verify_results(
    program: Program, spec: Engine, feeds: Iterable[Mapping[str, Tensor]], results: Iterable[Mapping[str, Tensor]]
) -> MeasuredError:
    """The same for results that are there already: those of the program in the engine's precision, where the engine cannot run.

    Args:
        program: the torch module, in float32.
        spec: the engine.
        feeds: inputs, of several shapes.
        results: the outputs for each of them.

    Raises:
        EngineError: as `verify_engine`.
    """
    pairs = zip(feeds, results, strict=True)
    errors = [_compared(program, feed, {name: found[name].numpy() for name in found}) for feed, found in pairs]
    return _judged(program.component, spec, errors, None)


def held_out_feeds(calibration: Calibration, component: str) -> list[dict[str, Tensor]]:
    """A few of the recorded inputs that a quantized engine was not calibrated on."""
    from mc_export.quantize.policy import split

    feeds = split(calibration, component).held_out
    feeds = feeds[:: -(-len(feeds) // _VERIFIED_FEEDS)]
    return [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in feeds]


def runs_here(component: str, spec: Engine, files: Sequence[Path]) -> bool:
    """Whether this machine can run an engine that was just built: a plan may be for a GPU that is not here."""
    try:
        create_backend(spec.target, Settings()).check(component, tuple(files), spec)
    except (BundleError, EngineError):
        return False
    return True


def _compared(program: Program, feed: Mapping[str, Tensor], results: Mapping[str, NDArray[np.float32]]) -> MeasuredError:
    """The largest error of any output on one feed."""
    extents = program.extents_of(feed)
    where = f"{program.component} at {', '.join(f'{name}={size}' for name, size in extents.items())}"
    expected = program.run(feed)
    errors = [measure(results[name], tensor.numpy(), f"{where}: {name}") for name, tensor in expected.items()]
    return _worst(errors, (extents,))


def _judged(component: str, spec: Engine, errors: Sequence[MeasuredError], tolerance: float | None) -> MeasuredError:
    """The largest of the errors. Raises EngineError where it exceeds the tolerance."""
    limit = tolerance_of(spec) if tolerance is None else tolerance
    worst = _worst(errors, tuple(shape for error in errors for shape in error.shapes))
    if not worst.relative_l2 <= limit:
        mend = "keep it in fp32" if spec.precision is not Precision.FP32 else "this is a fault of the exporter; report it"
        raise EngineError(
            f"{component}: {spec.target} {spec.precision} is off by {worst.relative_l2:.2g} (relative L2; largest "
            f"difference {worst.max_abs:.2g}), more than {limit:g}; {mend}"
            + (f" with --engine {component}={spec.target}:fp32" if spec.precision is not Precision.FP32 else "")
        )
    return worst


def tolerance_of(spec: Engine) -> float:
    """Largest relative L2 error that an engine may have."""
    if spec.precision in BY_LAYER:
        return _ROOM * hypot(float(spec.options[spec.precision.value]["loss"]), TOLERANCE[Precision.BF16])
    return TOLERANCE[spec.precision]


def check_finite(component: str, results: Mapping[str, Tensor]) -> None:
    """Raise EngineError where a number is not finite."""
    for name, output in results.items():
        if not bool(torch.isfinite(output).all()):
            raise EngineError(f"{component}: {name} has numbers that are not finite; build it in another precision")


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


def _worst(errors: Sequence[MeasuredError], shapes: tuple[dict[str, int], ...]) -> MeasuredError:
    return MeasuredError(
        max_abs=max(error.max_abs for error in errors),
        relative_l2=max(error.relative_l2 for error in errors),
        shapes=tuple(dict(items) for items in dict.fromkeys(tuple(shape.items()) for shape in shapes)),
    )
