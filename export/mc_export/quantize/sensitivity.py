"""Which layers stay in float32: the ones whose quantization costs most error for the work it saves, found by measuring.

One algorithm for every library: it is given the layers in graph order with the work each does, and a function that measures the
error of the engine with a given set of layers kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Outputs = Mapping[str, NDArray[np.float32]]
Probe = Callable[[frozenset[str]], float]

#: Layers that together do no more than this share of the work stay in float32 unasked: timestep embedding, modulation, first
#: patch embedding, last projection. They are the most sensitive ones and cost nothing.
FREE_SHARE = 0.01
#: Each group costs one measurement.
MAX_GROUPS = 16


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized, and its multiply-accumulates in one run."""

    name: str
    work: float


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        kept: names of the layers that stay in float32, in graph order.
        error: of the engine with them kept.
        error_of_all: of the engine with every layer quantized that costs anything.
        kept_work: share of the work that stays in float32.
        probes: how many measurements it took.
    """

    kept: tuple[str, ...]
    error: float
    error_of_all: float
    kept_work: float
    probes: int


def choose_kept(layers: Sequence[Layer], probe: Probe, gate: float) -> Selection:
    """Keeps as little work as meets the gate.

    Errors of layers add up like independent noise, as squares: what keeping a group takes off the squared error, over the work
    it does, is its rank. Groups are then kept in that order: as many as the squares promise to be enough, then one by one.

    Args:
        layers: in graph order.
        probe: the error of the engine with these layers kept in float32.
        gate: the largest error wanted.

    Returns:
        The first selection within the gate, or with every layer kept if none is.
    """
    free = free_layers(layers)
    worst = probe(free)
    if worst <= gate:
        return _selection(layers, free, worst, worst, 1)
    groups = grouped([layer for layer in layers if layer.name not in free])
    squared = _squared(worst)
    gains = {group: squared - _squared(probe(free | _names(group))) for group in groups}
    ranked = sorted(groups, key=lambda group: gains[group] / _work(group), reverse=True)
    probes = 1 + len(groups)
    left, promised = squared, 0
    while promised < len(ranked) - 1 and left > gate**2:
        left -= max(gains[ranked[promised]], 0.0)
        promised += 1
    kept, error = free, worst
    for count in range(max(1, promised), len(ranked) + 1):
        kept = free.union(*map(_names, ranked[:count]))
        error = probe(kept)
        probes += 1
        if error <= gate:
            break
    return _selection(layers, kept, error, worst, probes)


def free_layers(layers: Iterable[Layer]) -> frozenset[str]:
    """The smallest layers, as many as do no more than `FREE_SHARE` of the work together; never all of them."""
    by_work = sorted(layers, key=lambda layer: layer.work)
    limit = FREE_SHARE * _work(by_work)
    free: set[str] = set()
    done = 0.0
    for layer in by_work[:-1]:
        done += layer.work
        if done > limit:
            break
        free.add(layer.name)
    return frozenset(free)


def grouped(layers: Sequence[Layer], count: int = MAX_GROUPS) -> list[tuple[Layer, ...]]:
    """Neighbours in graph order together, in at most `count` groups of about equal work."""
    if len(layers) <= count:
        return [(layer,) for layer in layers]
    total = _work(layers)
    groups: list[list[Layer]] = [[] for _ in range(count)]
    done = 0.0
    for layer in layers:
        # By the middle of its work, so that every layer falls into one group.
        groups[min(count - 1, int(count * (done + layer.work / 2) / total))].append(layer)
        done += layer.work
    return [tuple(group) for group in groups if group]


def relative_error(results: Sequence[Outputs], references: Sequence[Outputs]) -> float:
    """Relative L2 error over all runs, of the output that is worst; infinite where a number is not finite."""
    worst = 0.0
    for name in references[0]:
        difference = sum(
            float(np.square(result[name].astype(np.float64) - reference[name]).sum())
            for result, reference in zip(results, references, strict=True)
        )
        norm = sum(float(np.square(reference[name], dtype=np.float64).sum()) for reference in references)
        worst = max(worst, float("inf") if not np.isfinite(difference) else (difference / max(norm, 1e-30)) ** 0.5)
    return worst


def _squared(error: float) -> float:
    """The squared error; one that is not finite is as bad as they come, and still compares."""
    return min(error, 1e6) ** 2


def _selection(layers: Sequence[Layer], kept: frozenset[str], error: float, worst: float, probes: int) -> Selection:
    names = tuple(layer.name for layer in layers if layer.name in kept)
    share = _work(layer for layer in layers if layer.name in kept) / max(_work(layers), 1e-30)
    return Selection(names, error, worst, share, probes)


def _names(group: Iterable[Layer]) -> frozenset[str]:
    return frozenset(layer.name for layer in group)


def _work(layers: Iterable[Layer]) -> float:
    return sum(layer.work for layer in layers)
