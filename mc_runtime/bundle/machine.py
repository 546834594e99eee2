"""Whether this machine can keep what a bundle promises."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mc_runtime.bundle.manifest import Machine, Precision
from mc_runtime.errors import BundleError
from mc_runtime.machine import this_machine

# On x86 an engine of these precisions also runs without the feature, but not with the numbers its measured
# error promises: int8 products saturate in 16 bits before VNNI, and bf16 becomes fp32.
_FEATURES = {
    Precision.BF16: "avx512_bf16|amx_bf16",
    Precision.INT8: "avx512_vnni|avx_vnni|amx_int8",
}


def machine_for(precisions: Iterable[Precision]) -> Machine:
    """What a bundle built on this machine with engines of these precisions needs of the one that runs it.

    A feature that the building machine lacks too is not asked for: the bundle's errors were measured without
    it.
    """
    here = this_machine()
    wanted = sorted({_FEATURES[precision] for precision in precisions if precision in _FEATURES})
    return Machine(arch=here.arch, os=here.os, features=tuple(name for name in wanted if _has(name, here.features)))


def check_machine(machine: Machine, where: str | Path) -> None:
    """Raise BundleError where this machine is not one the bundle at `where` was made for."""
    here = this_machine()
    mend = "build it again on this machine with `mc-runtime build`"
    if (machine.arch, machine.os) != (here.arch, here.os):
        raise BundleError(f"{where}: built for {machine.arch} {machine.os}, this machine is {here.arch} {here.os}; {mend}")
    missing = [feature for feature in machine.features if not _has(feature, here.features)]
    if missing:
        raise BundleError(f"{where}: needs CPU features {', '.join(missing)} that this machine lacks; {mend}")


def _has(feature: str, present: tuple[str, ...]) -> bool:
    return any(name in present for name in feature.split("|"))
