"""A program in FP8 or INT4 by what was measured of it."""

from __future__ import annotations

from mc_export.program.base import Program
from mc_export.quantize.fp8.layers import takes
from mc_export.quantize.fp8.record import Sensitivity
from mc_export.quantize.fp8.sensitivity import sites_of
from mc_export.quantize.fp8.sites import put_fp8
from mc_runtime.errors import EngineError, RequestError, named


def check_within_loss(measured: Sensitivity) -> None:
    """Raises EngineError where every site is kept, so that nothing would change, or those that are not lose too much."""
    if not sites_of(measured) or measured.error > measured.loss:
        raise EngineError(
            f"{measured.component}: no layers in {measured.activations.numbers} lose as little as {measured.loss:g} "
            f"(relative L2; all of them lose {measured.error_of_all:.2g}); build it in bf16, or allow more with "
            "mc-runtime calibrate --loss"
        )


def apply_fp8(program: Program, measured: Sensitivity) -> None:
    """Puts FP8 or INT4 layers into a program in float32, in place; what is above and between them is lowered to bfloat16 next.

    Raises:
        EngineError: as `check_within_loss`.
        RequestError: the program has other layers than the one that was measured.
    """
    component = program.component
    check_within_loss(measured)
    sites = sites_of(measured)
    there = {name for name, layer in program.named_modules() if takes(layer, measured.activations)}
    missing = [name for site in sites for name in site.layers if name not in there]
    if missing:
        raise RequestError(
            f"{component}: the calibration has a layer {named(missing[0])} that this program has not; "
            "run mc-runtime calibrate again"
        )
    put_fp8(program, sites, measured.activations)
