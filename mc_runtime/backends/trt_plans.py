"""What the manifest says of a TensorRT plan, and whether this machine can run it. Pure: nothing here imports an engine library.

A plan is read by the version that wrote it alone, on GPUs it was built for alone, at sizes of its profiles alone. All three are
known from the manifest, so that a plan that does not fit is refused when the bundle is opened, before gigabytes are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mc_runtime.backends.base import Shapes
from mc_runtime.backends.gpu import Gpu
from mc_runtime.bundle.dimensions import extents_in, sizes_of
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import BundleError, EngineError

Profile = Mapping[str, tuple[int, int, int]]
"""By dynamic dimension: the smallest size, the one it is tuned for, the largest."""


@dataclass(frozen=True)
class TrtPlan:
    """The options of a plan's engine.

    Attributes:
        version: of the library that built it.
        capabilities: compute capabilities it was built for, such as `8.9`.
        profiles: the sizes it takes; the library numbers them in this order.
        gpu_bytes: GPU memory that its weights take.
    """

    version: str
    capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...]
    gpu_bytes: int

    @classmethod
    def of(cls, component: str, spec: EngineSpec) -> TrtPlan:
        """The options that the manifest holds; what the build noted beside them is passed over.

        Raises:
            BundleError: they are not those of a plan.
        """
        try:
            profiles = tuple({str(name): _three(size) for name, size in each.items()} for each in spec.options["profiles"])
            if not profiles:
                raise ValueError("there is no profile")
            return cls(
                version=str(spec.options["version"]),
                capabilities=tuple(map(str, spec.options["capabilities"])),
                profiles=profiles,
                gpu_bytes=int(spec.options["gpu_bytes"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{component} engine: options {spec.options} are not those of a TensorRT plan ({error}); build the bundle again"
            ) from error

    def check_version(self, where: Path, target: str, here: str) -> None:
        """Raise EngineError where `here` is not the version of the library that built it."""
        if here != self.version:
            raise EngineError(
                f"{where}: built by {target} {self.version}, and {here} is installed, which does not read it; pip install "
                f"{target}=={self.version}, or build the bundle again with `mc-runtime build`"
            )

    def check_gpu(self, where: Path, target: str, gpu: Gpu | None) -> None:
        """Raise EngineError where there is no GPU, or none it was built for, or too little of its memory is free."""
        built = ", ".join(self.capabilities)
        if gpu is None:
            raise EngineError(f"{where}: a {target} plan runs on an NVIDIA GPU, and there is none here; use a machine with one")
        here = ".".join(map(str, gpu.capability))
        if here not in self.capabilities:
            raise EngineError(
                f"{where}: built for compute capability {built}, and {gpu.name} has {here}; {_rebuild(target, here)}"
            )
        if gpu.free < self.gpu_bytes:
            raise EngineError(
                f"{where}: its weights need {self.gpu_bytes / 2**30:.2f} GiB of GPU memory and {gpu.free / 2**30:.2f} GiB are "
                f"free on {gpu.name}; end what else runs there, or build it in a lower precision"
            )


def _rebuild(target: str, capability: str) -> str:
    if target == "tensorrt":
        return "build the bundle again on this machine"
    return f"build the bundle again with --compute-capability {capability}"


def choose_profile(name: str, spec: EngineSpec, plan: TrtPlan, shapes: Shapes) -> int:
    """The number of the profile that takes inputs of these shapes and is tuned for the nearest ones.

    Raises:
        EngineError: an input is missing, unknown or of a rank or size that no profile takes.
    """
    extents = extents_of(name, spec, shapes)
    fitting = [index for index, profile in enumerate(plan.profiles) if _takes(profile, extents)]
    if not fitting:
        raise EngineError(
            f"{name} engine: no profile takes {_said(extents)}; it was built for {_ranges(plan.profiles, extents)}"
        )
    return min(fitting, key=lambda index: _distance(plan.profiles[index], extents))


def extents_of(name: str, spec: EngineSpec, shapes: Shapes) -> dict[str, int]:
    """The sizes of an engine's dynamic dimensions in inputs of these shapes. Raises EngineError where they do not fit."""
    wanted = {tensor.name for tensor in spec.inputs}
    if wanted != set(shapes):
        raise EngineError(f"{name} engine: takes {sorted(wanted)} and was given {sorted(shapes)}")
    extents: dict[str, int] = {}
    for tensor in spec.inputs:
        try:
            found = extents_in(tensor.shape, shapes[tensor.name])
        except ValueError as error:
            raise EngineError(f"{name} engine: {tensor.name}: {error}") from None
        for symbol, size in found.items():
            if extents.setdefault(symbol, size) != size:
                raise EngineError(
                    f"{name} engine: {tensor.name} is {list(shapes[tensor.name])} where {list(tensor.shape)} is taken with "
                    f"{_said(extents)}"
                )
    return extents


def profile_shapes(inputs: Iterable[Tensor], profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """By input: its smallest shape, the one the profile is tuned for, and its largest."""
    corners = [{name: sizes[corner] for name, sizes in profile.items()} for corner in range(3)]
    return {tensor.name: tuple(sizes_of(tensor.shape, corner) for corner in corners) for tensor in inputs}


def _takes(profile: Profile, extents: Mapping[str, int]) -> bool:
    return all(low <= extents.get(name, low) <= high for name, (low, _, high) in profile.items())


def _distance(profile: Profile, extents: Mapping[str, int]) -> float:
    """How many times more, or less, work than what the profile is tuned for."""
    tuned = prod(profile[name][1] for name in extents if name in profile)
    given = prod(size for name, size in extents.items() if name in profile)
    return max(tuned, given) / max(1, min(tuned, given))


def _said(extents: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in extents.items())


def _ranges(profiles: Sequence[Profile], extents: Mapping[str, int]) -> str:
    return " or ".join(
        ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in profile.items() if name in extents)
        for profile in profiles
    )


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    low, tuned, high = map(int, sizes)
    if not 0 <= low <= tuned <= high:
        raise ValueError(f"{list(sizes)} is no smallest, usual and largest size")
    return low, tuned, high


_INVALID = {
    "VERSION_MISMATCH": "another version of the library built it: build the bundle again",
    "UNSUPPORTED_CC": "it was not built for this GPU: build the bundle again with --compute-capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: update cuda-bindings",
    "INSUFFICIENT_GPU_MEMORY": "the GPU's memory is too small or too full for it: end what else runs there",
    "MALFORMED_ENGINE": "its file is damaged: build the bundle again",
    "CUDA_ERROR": "CUDA failed: check the driver with nvidia-smi",
}


def why_invalid(diagnostics: int, bits: Mapping[str, int]) -> str:
    """What the library's diagnosis of a plan means, and the mend; `bits` are its members and their values."""
    found = [mend for name, mend in _INVALID.items() if name in bits and diagnostics & bits[name]]
    return "; ".join(found) or "the library refuses it and gives no reason: check the driver with nvidia-smi"
