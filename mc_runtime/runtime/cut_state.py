"""The loop's state where a step runs in two parts, the second only when a sample asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from mc_runtime.backends.base import Array, Call, Shapes
from mc_runtime.bundle.dimensions import extents_in, sizes_of
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import BundleError
from mc_runtime.runtime.batch import StepBatch
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.reuse import Decisions
from mc_runtime.runtime.step_state import StepState
from mc_runtime.runtime.work import EngineClock
from mc_runtime.sampling.tables import Schedule

# Of `step_first`, the inputs that `step_rest` gives, and their names there.
_KEPT = {"kept_change": "next_change", "kept_residual": "next_residual"}


@dataclass(frozen=True)
class Cut:
    """The rest of a step in two parts.

    Attributes:
        rest: `step_rest`, of the backend that `step_first` is of.
        decisions: which samples keep their residual, step by step.
        constant: further inputs of the rest alone.
    """

    rest: LoadedEngine
    decisions: Decisions
    constant: Mapping[str, Array] = field(default_factory=dict)


class CutState(StepState):
    """`step_first` and `step_rest` bound to the same buffers: where the rest runs, its samples take the place of those that the
    first part ended with.

    Args:
        first: the engine of the first part.
        cut: what follows it.
        batch, schedule, clock: as for a whole step.
    """

    def __init__(self, first: LoadedEngine, cut: Cut, batch: StepBatch, schedule: Schedule, clock: EngineClock) -> None:
        self._cut = cut
        self._here = 0  # which of each pair in `_kept` holds what is kept now
        self._bound: dict[tuple[bool, int, int], Call] = {}
        super().__init__(first, batch, schedule, clock)

    def _bind(self, step: LoadedEngine) -> None:
        """Makes the buffers; each pair of them is bound when it first comes up."""
        self._first = step
        self._of_rest = {name: self._backend.to_device(array) for name, array in self._cut.constant.items()}
        there = {name: buffer.shape for name, buffer in self._inputs(0).items()}
        shapes = _sized(step.spec, there, (*step.spec.inputs, *step.spec.outputs))
        self._kept = {name: self._pair(np.zeros(shapes[name], np.float32)) for name in _KEPT}
        swapped = {name for _, name, _ in self._swapped}
        self._given = {
            tensor.name: self._backend.empty(shapes[tensor.name]) for tensor in step.spec.outputs if tensor.name not in swapped
        }
        self._keep = self._backend.empty(shapes["difference"])

    def _run(self, index: int) -> None:
        side = index % 2
        with self._clock:
            self._call(False, side).run()
            difference = None
            if self._cut.decisions.asks(index):
                difference = np.array(self._backend.to_host(self._given["difference"]))
        keep = self._cut.decisions.take(index, difference)
        if keep.all():
            return
        with self._clock:
            self._backend.write(self._keep, keep.astype(np.float32))
            self._call(True, side).run()
        self._here = 1 - self._here

    def _call(self, rest: bool, side: int) -> Call:
        key = (rest, side, self._here)
        if key not in self._bound:
            inputs, outputs = self._inputs(side), self._outputs(side)
            inputs |= {name: pair[self._here] for name, pair in self._kept.items()}
            if rest:
                inputs |= self._given | self._of_rest | {"keep": self._keep}
                outputs |= {_KEPT[name]: pair[1 - self._here] for name, pair in self._kept.items()}
            else:
                outputs |= self._given
            engine = self._cut.rest if rest else self._first
            taken = {tensor.name: inputs[tensor.name] for tensor in engine.spec.inputs}
            self._bound[key] = engine.engine.bind(taken, outputs)
        return self._bound[key]


def rest_shapes(first: EngineSpec, rest: EngineSpec, shapes: Shapes) -> Shapes:
    """The shapes of `step_rest`'s inputs where those of `step_first` are `shapes`."""
    return _sized(first, shapes, rest.inputs)


def _sized(first: EngineSpec, shapes: Shapes, wanted: Iterable[Tensor]) -> Shapes:
    """The shapes of tensors by the sizes that inputs of the first part have. Raises BundleError where they are not its."""
    sizes: dict[str, int] = {}
    try:
        for tensor in first.inputs:
            if tensor.name in shapes:
                sizes |= extents_in(tensor.shape, shapes[tensor.name])
        return {tensor.name: sizes_of(tensor.shape, sizes) for tensor in wanted}
    except (KeyError, ValueError) as error:
        raise BundleError(
            f"step_first engine: its inputs are not those of this bundle's requests ({error}); build the bundle again with "
            "`mc-runtime build`"
        ) from None
