"""What every site costs in FP8 or INT4, alone, and which of them stay in bfloat16 so that the whole stays within a loss.

One site after another is put into it while everything else computes in float32, and the program runs inputs of real requests
that no range was taken from. Errors of sites add up like independent noise, as squares; so sites are kept in the order of their
squared error over the work they do, as many as the squares promise to be enough, and then as many as the measured error of the
whole asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mc_export.lower import Calibration
from mc_export.program.base import Program
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.record import MeasuredSite, Reason, Sensitivity
from mc_export.quantize.fp8.sites import Feed, Site, find_sites, in_fp8
from mc_export.quantize.policy import split
from mc_export.quantize.sensitivity import Layer, Outputs, free_layers, relative_error
from mc_runtime.errors import EngineError

#: Relative L2 error of an engine's results that FP8 may cost, unless another is asked for; a step's is that of its guided
#: prediction. e4m3 keeps four significant bits, and the demo loses no picture at this (docs/fp8.md).
LOSS = {"planner": 0.05, "step": 0.08}
#: The same of INT4, whose blocks keep three significant bits at most.
INT4_LOSS = {"planner": 0.08, "step": 0.10}

_MEASURED_ON = 4
_NOT_FINITE = 1e6
_WIDTHS = {
    "FP8": "both widths of its weights multiples of 16",
    "INT4": "its weights' input width a multiple of 32, the other one of 16",
}
_LEAST_SHRINK = 0.9

Tick = Callable[[int, int, str], None]


def loss_of(component: str, activations: Activations) -> float:
    """The error that a component may lose unless another is asked for."""
    return (INT4_LOSS if activations is Activations.BLOCKS else LOSS)[component]


@dataclass
class _Probe:
    """Runs a program with sites in FP8 or INT4 and says how far its results are off."""

    program: Program
    feeds: Sequence[Feed]
    activations: Activations
    references: Sequence[Outputs]

    def error(self, sites: Sequence[Site]) -> float:
        """Relative L2, of the output that is worst, over all feeds."""
        with in_fp8(self.program, sites, self.activations):
            return min(relative_error(_results(self.program, self.feeds), self.references), _NOT_FINITE)


def measure(
    program: Program, inputs: Calibration, activations: Activations, loss: float, tick: Tick = lambda done, total, what: None
) -> Sensitivity:
    """Measures every site of a program and chooses those that are kept.

    Args:
        program: in float32; it is the same again afterwards.
        inputs: of real requests (`mc_export.quantize.calibration.calibration_inputs`).
        activations: what has a scale of its own.
        loss: the largest relative L2 error wanted.
        tick: told what is done, of how much, and of which site; what it raises stops the measuring.

    Returns:
        With `error` within `loss`, or every site kept if nothing less is.

    Raises:
        EngineError: the program has no layers that it is for.
    """
    component = program.component
    feeds = split(inputs, component)
    held_out = [_tensors(feed) for feed in feeds.held_out[:: -(-len(feeds.held_out) // _MEASURED_ON)]]
    calibration = [_tensors(feed) for feed in feeds.calibration]
    sites = find_sites(program, calibration, activations)
    if not sites:
        raise EngineError(
            f"{component}: has no product that {activations.numbers} is for: {_WIDTHS[activations.numbers]}; build it in bf16"
        )
    total = len(sites) + 3
    tick(1, total, component)
    probe = _Probe(program, held_out, activations, _results(program, held_out))
    errors: dict[str, float] = {}
    for site in sites:
        errors[site.name] = probe.error([site])
        tick(1 + len(errors), total, site.name)
    free = free_layers([Layer(site.name, site.work) for site in sites])
    quantized = [site for site in sites if site.name not in free]
    error_of_all = probe.error(quantized)
    tick(total - 1, total, component)
    kept, error = choose(quantized, errors, probe.error, loss, error_of_all)
    tick(total, total, component)
    work = sum(site.work for site in sites)
    reasons: dict[str, Reason] = {}
    reasons.update(dict.fromkeys(free, "work"))
    reasons.update(dict.fromkeys(kept, "loss"))
    return Sensitivity(
        component=component, activations=activations, loss=loss, error=error, error_of_all=error_of_all,
        calibrated_on=len(calibration),
        sites=tuple(
            MeasuredSite(
                layers=site.layers, work=site.work / work, largest=site.largest, error=errors[site.name],
                kept=reasons.get(site.name),
            )
            for site in sites
        ),
    )  # fmt: skip


def choose(
    sites: Sequence[Site], errors: Mapping[str, float], probe: Callable[[Sequence[Site]], float], loss: float, error: float
) -> tuple[frozenset[str], float]:
    """The sites to keep, by name, and the error of the rest together.

    Args:
        sites: all that may be in FP8.
        errors: of each alone.
        probe: the error of some of them together.
        loss: the largest error wanted.
        error: of all of them.
    """
    ranked = sorted(sites, key=lambda site: errors[site.name] ** 2 / site.work, reverse=True)
    squares = [errors[site.name] ** 2 for site in ranked]
    # What the squares add up to is not quite what they are together; the allowance is in their terms.
    allowed = sum(squares) * (loss / max(error, 1e-30)) ** 2
    kept = 0
    while error > loss and kept < len(ranked):
        promised = kept + 1
        while promised < len(ranked) and sum(squares[promised:]) > allowed:
            promised += 1
        kept = promised
        error = probe(ranked[kept:]) if kept < len(ranked) else 0.0
        allowed *= min(_LEAST_SHRINK, (loss / max(error, 1e-30)) ** 2)
    return frozenset(site.name for site in ranked[:kept]), error


def sites_of(measured: Sensitivity) -> list[Site]:
    """The sites that are in FP8 or INT4."""
    return [Site(site.layers, site.work, site.largest) for site in measured.sites if site.kept is None]


def _results(program: Program, feeds: Sequence[Feed]) -> list[Outputs]:
    with torch.inference_mode():
        return [{name: output.numpy() for name, output in program.run(feed).items()} for feed in feeds]


def _tensors(feed: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:  # type: ignore[type-arg]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
