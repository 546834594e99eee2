"""Which samples keep the residual of an earlier step: decided step by step, each by its own change alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.engines import STEP, STEP_FIRST
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.errors import RequestError
from mc_runtime.lora import ActiveLora
from mc_runtime.tasks.checks import checked_number

CacheChoice = bool | float
"""Whether to keep residuals between steps, by the bundle's threshold or by this one."""

# Beyond it nothing is left to tell apart: what the first block adds has become something else altogether.
_LARGEST_THRESHOLD = 1e6
_MEND = "build the bundle again with `mc-runtime build … --cache`"


@dataclass(frozen=True)
class Reuse:
    """When a step keeps the residual of an earlier one.

    Attributes:
        threshold: a sample whose change behind the first block is below it keeps its residual.
        first, last: steps at the start and at the end that keep none.
        max_consecutive: most steps in a row that keep one residual.
    """

    threshold: float
    first: int
    last: int
    max_consecutive: int


def reuse_of(manifest: Manifest, choice: CacheChoice, lora: ActiveLora) -> Reuse | None:
    """What a request asked for; None for whole steps.

    Raises:
        RequestError: the bundle has no engines for it, no threshold of its own, or takes no adapters there.
    """
    if choice is False or choice is None:
        return None
    listed = manifest.step_cache
    if listed is None:
        raise RequestError(f"this bundle keeps nothing between steps; {_MEND}, or leave cache out")
    if lora.of(STEP) and not any(engine.lora for name, engine in manifest.engines.items() if name.startswith(STEP_FIRST)):
        raise RequestError(f"this bundle takes no LoRA of its backbone with cache; {_MEND} --lora-rank, or leave one out")
    if choice is True:
        if listed.threshold is None:
            raise RequestError(
                "this bundle has no calibrated threshold (its engines could not run where it was built); name one, such as 0.1"
            )
        threshold = listed.threshold
    else:
        threshold = checked_number("the cache's threshold", choice, 0, _LARGEST_THRESHOLD)
    return Reuse(threshold, listed.first, listed.last, listed.max_consecutive)


class Decisions:
    """The decisions of one batch.

    Args:
        reuse: when to keep.
        steps: of the schedule.

    Attributes:
        computed: i64 `[B]`, steps that each sample computed whole so far.
    """

    def __init__(self, reuse: Reuse, steps: int, samples: int) -> None:
        self._reuse = reuse
        self._steps = steps
        self._run = np.zeros(samples, np.int64)
        self.computed = np.zeros(samples, np.int64)

    def asks(self, index: int) -> bool:
        """Whether the change of step `index` decides: it does not where all samples are computed in any case."""
        return self._reuse.first <= index < self._steps - self._reuse.last

    def take(self, index: int, difference: NDArray[np.float32] | None) -> NDArray[np.bool_]:
        """Which samples keep their residual at step `index`: bool `[B]`.

        Args:
            index: of the step; every step is asked for once, in order.
            difference: f32 `[B]`, each sample's relative change since its residual was computed; None where none may be kept.
                One that is not a number keeps nothing.
        """
        keep = np.zeros(len(self._run), bool)
        if difference is not None and self.asks(index):
            keep = (difference < self._reuse.threshold) & (self._run < self._reuse.max_consecutive)
        self._run = np.where(keep, self._run + 1, 0)
        self.computed += ~keep
        return keep
