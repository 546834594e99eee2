"""How much memory a run of a program takes, found without running it: every tensor's size, while it is alive.

The program runs on tensors that have shapes and no numbers. What is counted is eager PyTorch's: a compiler keeps fewer tensors
between its kernels, libraries take workspaces of their own, and attention is counted as the fused kernels have it, without its
scores. So it is an estimate, for saying before a request begins that it will not fit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mc_export.program.base import Program, shape_of

_SINGLE = frozenset({"B"})  # a run's size is that of one picture; its power says what a batch takes


def run_memory_of(program: Program) -> dict[str, Any]:
    """The `run_memory` of a package (`mc_runtime.backends.packages.RunMemory`): at the largest sizes the program serves.

    Growth is measured by halving one dimension after another.
    """
    largest = {axis.name: axis.min if axis.name in _SINGLE else axis.max for axis in program.axes.values()}
    peak = peak_bytes(program, largest)
    powers = {}
    for axis in program.axes.values():
        size = largest[axis.name]
        other = 2 * size if axis.name in _SINGLE else max(axis.min, size // 2 // axis.multiple * axis.multiple)
        if other == size:
            powers[axis.name] = 0.0
            continue
        grown = peak_bytes(program, largest | {axis.name: other})
        powers[axis.name] = round(max(0.0, math.log(grown / peak) / math.log(other / size)), 3)
    return {"bytes": peak, "at": largest, "powers": powers}


def peak_bytes(program: Program, extents: Mapping[str, int]) -> int:
    """The most bytes alive at once in a run at these sizes: inputs, outputs and what lies between; weights are not counted."""
    alive = _Alive()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), alive:
        inputs = {spec.name: torch.zeros(shape_of(spec, extents), dtype=getattr(torch, spec.dtype)) for spec in program.inputs}
        program(**inputs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Adds up the memory of tensors while they are alive; views share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size
