"""Step caching in the manifest: how much may change before a residual is computed anew, and what that was measured to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mc_runtime.bundle.checks import at_least_one
from mc_runtime.bundle.dimensions import names_in
from mc_runtime.bundle.engines import STEP_FIRST, STEP_REST

if TYPE_CHECKING:
    from mc_runtime.bundle.manifest import Component, Engine


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a threshold costs and saves, over the calibration's requests.

    Attributes:
        threshold: of the relative change behind the first block.
        loss: relative L2 difference of the final latents from those without caching, the mean over requests.
        largest: the same of the worst request.
        computed: share of the steps that were computed whole.
    """

    threshold: float
    loss: float
    largest: float
    computed: float

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.loss >= 0 and self.largest >= 0 and 0 <= self.computed <= 1):
            raise ValueError("calibrated: expected a threshold, losses and a share")


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """How requests with caching run.

    Attributes:
        threshold: for requests that name none: the largest calibrated one whose loss is at most `loss`; null where none was
            calibrated, because the building machine could not run the engines.
        loss: what the calibration was to keep to.
        calibrated: the table it was chosen from.
        requests, steps: the calibration's requests, and denoising steps of each.
        first, last: steps at the start and at the end that are computed in any case.
        max_consecutive: most steps in a row that keep one residual.
    """

    threshold: float | None = None
    loss: float
    calibrated: tuple[Calibrated, ...] = ()
    requests: int = 0
    steps: int = 0
    first: int = 1
    last: int = 1
    max_consecutive: int = 3

    def __post_init__(self) -> None:
        at_least_one(first=self.first, max_consecutive=self.max_consecutive)
        if self.last < 0 or min(self.requests, self.steps) < 0:
            raise ValueError("step_cache: expected counts of 0 or more")
        if not 0 < self.loss < 1:
            raise ValueError(f"loss: expected more than 0 and less than 1, found {self.loss:g}")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold: expected 0 or more, found {self.threshold:g}")


def check_cut_steps(engines: Mapping[Component, Engine], cache: StepCache | None) -> None:
    """Raise ValueError where requests with caching could not run: an engine is missing, they are of two libraries, or one gives
    another shape than the next one takes.
    """
    first, rest = engines.get(STEP_FIRST), engines.get(STEP_REST)
    if cache is None and first is None and rest is None:
        return
    if cache is None or first is None or rest is None:
        raise ValueError(f"step_cache: belongs with both engines, {STEP_FIRST!r} and {STEP_REST!r}")
    if first.target != rest.target:
        raise ValueError(f"engines.{STEP_REST}: needs a {STEP_FIRST!r} of the same target, {rest.target}")
    given = {tensor.name: tensor for tensor in (*first.inputs, *first.outputs)}
    known = {name for tensor in first.inputs for name in names_in(tensor.shape)}
    unknown = {name for tensor in (*first.outputs, *rest.outputs) for name in names_in(tensor.shape)} - known
    if unknown:
        raise ValueError(f"engines.{STEP_FIRST}.outputs: no input has the dimension {', '.join(sorted(unknown))}")
    if given["difference"].shape != given["sample"].shape[:1]:
        raise ValueError(f"engines.{STEP_FIRST}.outputs: 'difference' is not one number a sample")
    for tensor in rest.inputs:
        if tensor.name != "keep" and given.get(tensor.name) != tensor:
            raise ValueError(f"engines.{STEP_REST}.inputs: {tensor.name!r} is not what {STEP_FIRST!r} takes or gives")
    kept = given["kept_change"].shape
    if any(tensor.shape != kept for tensor in rest.outputs if tensor.name in ("next_change", "next_residual")):
        raise ValueError(f"engines.{STEP_REST}.outputs: what it keeps is not what {STEP_FIRST!r} takes")
