"""The choice of layers that stay in float32, against made-up layers whose errors are known."""

from __future__ import annotations

import numpy as np
import pytest

from mc_export.quantize.sensitivity import FREE_SHARE, Layer, choose_kept, free_layers, grouped, relative_error

# A small layer that is free, and ten whose squared errors add up; the third and the eighth make most of it.
SQUARED = {"embed": 0.5, **{f"layer{index}": 1e-4 for index in range(10)}, "layer3": 0.04, "layer8": 0.02}
LAYERS = [Layer("embed", 1.0), *(Layer(f"layer{index}", 100.0 if index != 8 else 800.0) for index in range(10))]


class Probe:
    """The error of an engine with some layers kept, if errors were independent noise; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[frozenset[str]] = []

    def __call__(self, kept: frozenset[str]) -> float:
        self.asked.append(kept)
        return sum(squared for name, squared in SQUARED.items() if name not in kept) ** 0.5


def test_nothing_but_the_free_is_kept_within_the_gate() -> None:
    probe = Probe()
    selection = choose_kept(LAYERS, probe, gate=0.5)
    assert selection.kept == ("embed",)
    assert selection.error == selection.error_of_all == pytest.approx(probe(frozenset({"embed"})))
    assert selection.probes == 1


def test_the_costly_in_error_are_kept_first() -> None:
    selection = choose_kept(LAYERS, Probe(), gate=0.15)
    assert selection.kept == ("embed", "layer3")
    assert selection.error == pytest.approx((0.02 + 8e-4) ** 0.5)
    assert selection.error_of_all > 0.15 >= selection.error
    assert selection.kept_work == pytest.approx(101 / 1701)


def test_more_are_kept_for_a_smaller_gate() -> None:
    probe = Probe()
    selection = choose_kept(LAYERS, probe, gate=0.04)
    assert selection.kept == ("embed", "layer3", "layer8")
    assert selection.probes == len(probe.asked) == 12  # all, each of ten, and the two that the squares promised


def test_a_gate_that_nothing_meets_keeps_every_layer() -> None:
    selection = choose_kept(LAYERS, lambda kept: 1.0, gate=0.1)
    assert selection.kept == tuple(layer.name for layer in LAYERS)
    assert selection.error == 1.0


def test_an_infinite_error_is_ranked_too() -> None:
    def probe(kept: frozenset[str]) -> float:
        return 0.01 if "layer5" in kept else float("inf")

    assert choose_kept(LAYERS, probe, gate=0.1).error == 0.01


def test_free_layers_are_the_smallest_and_never_all() -> None:
    layers = [Layer("a", 100.0), Layer("b", 0.4), Layer("c", 0.5), Layer("d", 0.2), Layer("e", 50.0)]
    free = free_layers(layers)
    assert free == {"b", "c", "d"}
    assert sum(layer.work for layer in layers if layer.name in free) <= FREE_SHARE * sum(layer.work for layer in layers)
    assert free_layers([Layer("only", 1.0)]) == frozenset()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_groups_hold_every_layer_once_in_order(count: int) -> None:
    generator = np.random.default_rng(0)
    layers = [Layer(str(index), float(work)) for index, work in enumerate(generator.uniform(1, 50, size=61))]
    groups = grouped(layers, count)
    assert [layer for group in groups for layer in group] == layers
    assert len(groups) <= count
    assert grouped(layers[:count], count) == [(layer,) for layer in layers[:count]]


def test_relative_error_is_the_worst_output_s() -> None:
    reference = {"a": np.array([3.0, 4.0], np.float32), "b": np.array([10.0], np.float32)}
    result = {"a": np.array([3.0, 4.5], np.float32), "b": np.array([10.1], np.float32)}
    assert relative_error([result], [reference]) == pytest.approx(0.1)
    assert relative_error([reference], [reference]) == 0
    assert relative_error([{**result, "b": np.array([np.nan], np.float32)}], [reference]) == float("inf")
