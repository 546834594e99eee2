"""Whether a GPU can run compiled packages: its kind, its memory, and what its errors mean. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mc_runtime.backends.packages import AGAIN, INSTEAD, Package
from mc_runtime.errors import BundleError, EngineError


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; `free` is in bytes, what the process keeps unused included."""

    name: str
    capability: tuple[int, int]
    free: int


def check_gpu(package: Package, where: Path, gpu: Gpu | None) -> None:
    """Whether a GPU is of the kind a package was compiled for.

    Machine code runs on GPUs of its major compute capability, from its minor one on.

    Raises:
        BundleError: there is no GPU, or it is of another compute capability.
    """
    if package.capability is None:
        raise BundleError(f"{where}: compiled for a CPU, and an engine of target inductor-cuda; build the bundle again")
    wanted = ".".join(map(str, package.capability))
    if gpu is None:
        raise BundleError(f"{where}: compiled for a GPU of compute capability {wanted}, and torch sees none here; {AGAIN}")
    major, minor = package.capability
    if gpu.capability[0] != major or gpu.capability[1] < minor:
        here = ".".join(map(str, gpu.capability))
        raise BundleError(f"{where}: compiled for compute capability {wanted}, {gpu.name} has {here}; {AGAIN}")


def check_weights(packages: Mapping[str, Package], gpu: Gpu) -> None:
    """Raise EngineError unless a GPU has room for the weights of all these engines, which stay loaded together."""
    needed = sum(package.gpu_bytes for package in packages.values())
    if needed > gpu.free:
        raise EngineError(
            f"the weights of {', '.join(packages)} need {_gib(needed)} of GPU memory and {_gib(gpu.free)} are free on "
            f"{gpu.name}; end what else runs there, build the bundle in bf16, {INSTEAD}"
        )


def check_run(name: str, package: Package, extents: Mapping[str, int], gpu: Gpu) -> None:
    """Raise EngineError unless a GPU has room for a run of these sizes, beside the weights that it holds already."""
    needed = 0 if package.run is None else package.run.at_sizes(extents)
    if needed > gpu.free:
        asked = ", ".join(f"{key}={size}" for key, size in extents.items())
        raise EngineError(
            f"{name} engine: a run at {asked} needs about {_gib(needed)} of GPU memory and {_gib(gpu.free)} are free on "
            f"{gpu.name}; ask for fewer or smaller pictures, build the bundle in bf16, {INSTEAD}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


_FAULTS = (
    ("out of memory", "the GPU's memory is full: ask for fewer or smaller pictures, or end what else runs there"),
    ("no kernel image", "it was compiled for another GPU: build the bundle again on this machine"),
    ("driver version is insufficient", "the NVIDIA driver is too old for this library: update the driver"),
    ("illegal memory access", "a fault of the kernels: please report it; until then build with --target onnxruntime"),
)


def gpu_mend(message: str) -> str:
    """What to do about an error of CUDA's, in front of its own words; the words alone where nothing is known of it."""
    lowered = message.lower()
    return next((f"{mend} ({message})" for fault, mend in _FAULTS if fault in lowered), message)
