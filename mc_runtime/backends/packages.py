"""What the manifest says of a compiled torch package, and whether this machine can run it. Nothing here imports torch.

A package holds native code for one kind of processor and one version of torch; running it anywhere else ends the process, so
everything is compared before the library is opened, and every run's shapes before the library sees them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import BundleError, EngineError
from mc_runtime.machine import this_machine

METADATA_KEY = "mc_runtime_signature"
INSTEAD = "or build it for another target, such as --target onnxruntime"
AGAIN = f"build the bundle again with `mc-runtime build` on a machine like this one, {INSTEAD}"


def base_version(version: str) -> str:
    """A torch version without its local part: `2.13.0+cpu` and `2.13.0+cu130` share what compiled code depends on."""
    return version.partition("+")[0]


@dataclass(frozen=True)
class RunMemory:
    """About how much memory one run takes for its inputs, outputs and what is alive between them.

    Attributes:
        bytes: at the sizes `at`, estimated from the program when it was built.
        at: size of each dynamic dimension.
        powers: by dimension, with which power of its size the bytes grow near there.
    """

    bytes: int
    at: Mapping[str, int]
    powers: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.bytes < 0 or set(self.at) != set(self.powers) or not all(size > 0 for size in self.at.values()):
            raise ValueError("run_memory: expected bytes, and a size and a power for each dimension")

    def at_sizes(self, extents: Mapping[str, int]) -> int:
        """The bytes at other sizes; dimensions that `extents` lacks count as they are in `at`."""
        factors = [(extents.get(name, size) / size) ** self.powers[name] for name, size in self.at.items()]
        return int(self.bytes * math.prod(factors))


@dataclass(frozen=True)
class Package:
    """The options of a package's engine.

    Attributes:
        torch: the version it was compiled with.
        features: of the CPU it was compiled for; empty for a GPU.
        sizes: by dynamic dimension, the smallest and largest size and what sizes are a multiple of.
        capability: compute capability of the GPU it was compiled for, or None for a CPU.
        gpu_bytes: GPU memory that the weights take; 0 for a CPU.
        run: what a run takes beside them; None where the build did not say.
    """

    torch: str
    features: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int, int]]
    capability: tuple[int, int] | None = None
    gpu_bytes: int = 0
    run: RunMemory | None = None

    @classmethod
    def of(cls, component: str, spec: EngineSpec) -> Package:
        """The options that the manifest holds. Raises BundleError where they are not those of a package."""
        given = dict(spec.options)
        try:
            capability = given.pop("capability", None)
            package = cls(
                torch=str(given.pop("torch")),
                features=tuple(map(str, given.pop("features", ()))),
                sizes={str(name): _three(size) for name, size in given.pop("sizes").items()},
                capability=None if capability is None else (int(capability[0]), int(capability[1])),
                gpu_bytes=int(given.pop("gpu_bytes", 0)),
                run=RunMemory(**given.pop("run_memory")) if "run_memory" in given else None,
            )
            if given:
                raise ValueError(f"unknown: {', '.join(given)}")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise BundleError(
                f"{component} engine: options {spec.options} are not those of a compiled package ({error}); "
                "build the bundle again"
            ) from error
        return package

    def check_torch(self, where: Path, version: str) -> None:
        """Raise BundleError where `version` of torch is not the one the package was compiled with."""
        if base_version(version) != self.torch:
            raise BundleError(
                f"{where}: compiled with torch {self.torch}, here is {version}; pip install torch=={self.torch}, or {AGAIN}"
            )

    def check_cpu(self, where: Path, present: Sequence[str] | None = None) -> None:
        """Raise BundleError where this CPU lacks a feature that the package was compiled for."""
        here = this_machine().features if present is None else present
        missing = [feature for feature in self.features if feature not in here]
        if missing:
            raise BundleError(f"{where}: compiled for a CPU with {', '.join(missing)}, which this one lacks; {AGAIN}")


def _three(size: Sequence[Any]) -> tuple[int, int, int]:
    smallest, largest, multiple = map(int, size)
    return smallest, largest, multiple


def check_shapes(name: str, spec: EngineSpec, package: Package, found: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Whether inputs (shape and dtype by name) are what compiled code was made for: it would read past the end of others.

    Raises:
        EngineError: an input is missing, unknown, or of another dtype or size than the signature allows.
    """
    names = {tensor.name for tensor in spec.inputs}
    if names != set(found):
        raise EngineError(f"{name} engine: takes {sorted(names)} and was given {sorted(found)}")
    extents: dict[str, int] = {}
    for tensor in spec.inputs:
        shape, dtype = found[tensor.name]
        fits = len(shape) == len(tensor.shape) and dtype == tensor.dtype
        for wanted, size in zip(tensor.shape, shape, strict=False):
            fits &= size == (extents.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        if not fits:
            raise EngineError(
                f"{name} engine: {tensor.name} is {dtype} {list(shape)} where {tensor.dtype} {list(tensor.shape)} is taken"
                + (f" with {', '.join(f'{key}={size}' for key, size in extents.items())}" if extents else "")
            )
    for symbol, size in extents.items():
        smallest, largest, multiple = package.sizes.get(symbol, (1, size, 1))
        if not smallest <= size <= largest or size % multiple:
            raise EngineError(
                f"{name} engine: {symbol} is {size}, and it was compiled for {smallest} to {largest}"
                + (f" in steps of {multiple}" if multiple > 1 else "")
            )


def described_signature(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """A signature as one line of JSON, to be kept inside the package."""
    return json.dumps([[[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in side] for side in (inputs, outputs)])


def signature_described(text: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `described_signature` wrote. Raises ValueError where it did not write it."""
    inputs, outputs = json.loads(text)
    return _tensors(inputs), _tensors(outputs)


def _tensors(side: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in side)
