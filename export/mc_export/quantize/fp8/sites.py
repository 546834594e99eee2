"""Where a program has matrix products that FP8 or INT4 is for, found by running it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.program.base import Program
from mc_export.quantize.fp8.layers import Activations, fp8_layer, takes

Feed = Mapping[str, Tensor]


@dataclass(frozen=True)
class Site:
    """Layers that read one input, such as the projections of an attention: they share its codes, and some targets merge them.

    Attributes:
        layers: their names in the program.
        work: multiply-accumulates of one run.
        largest: of their input's magnitudes over all runs.
    """

    layers: tuple[str, ...]
    work: float
    largest: float

    @property
    def name(self) -> str:
        """The first layer's."""
        return self.layers[0]


class _Seen:
    """Notes, while a program runs, what every layer reads."""

    def __init__(self) -> None:
        self.layers: dict[str, str] = {}
        self.work: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        self._inputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def note(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """A layer is given x; layers that are given the very same tensor are one site, named by the first of them."""
        known = self._inputs.get(id(x))
        first = known[1] if known is not None and known[0]() is x else name
        self._inputs[id(x)] = (weakref.ref(x), first)
        site = self.layers.setdefault(name, first)
        weight: Any = layer.weight
        self.work[name] = self.work.get(name, 0.0) + float(x.numel() // weight.shape[1] * weight.numel())
        self.largest[site] = max(self.largest.get(site, 0.0), float(x.abs().amax()))


@torch.inference_mode()
def find_sites(program: Program, feeds: Sequence[Feed], activations: Activations = Activations.ROWS) -> tuple[Site, ...]:
    """The program's sites in the order in which they run, with the ranges of their inputs over all feeds.

    A layer that no run calls as a module is none: something else reads its weights.
    """
    seen, hooks = _Seen(), []
    for name, layer in program.named_modules():
        if takes(layer, activations):
            hooks.append(layer.register_forward_pre_hook(partial(_tell, seen, name), with_kwargs=True))
    try:
        for feed in feeds:
            program.run(feed)
    finally:
        for handle in hooks:
            handle.remove()
    members: dict[str, list[str]] = {}
    for name, site in seen.layers.items():
        members.setdefault(site, []).append(name)
    return tuple(
        Site(tuple(names), sum(seen.work[name] for name in names) / len(feeds), seen.largest[site])
        for site, names in members.items()
    )


def _tell(seen: _Seen, name: str, layer: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    seen.note(name, layer, given[0] if given else named["input"])


def put_fp8(program: nn.Module, sites: Iterable[Site], activations: Activations) -> dict[str, nn.Module]:
    """Puts FP8 or INT4 layers in the place of the sites' layers; returns those that were there, by name."""
    before = {}
    for site in sites:
        for name in site.layers:
            layer = program.get_submodule(name)
            before[name] = layer
            _set(program, name, fp8_layer(layer, activations, site.largest))
    return before


@contextmanager
def in_fp8(program: nn.Module, sites: Iterable[Site], activations: Activations) -> Iterator[None]:
    """The program with these sites in FP8 or INT4, for as long as the context lasts."""
    before = put_fp8(program, sites, activations)
    try:
        yield
    finally:
        for name, layer in before.items():
            _set(program, name, layer)


def _set(program: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(program.get_submodule(parent), attribute, layer)
