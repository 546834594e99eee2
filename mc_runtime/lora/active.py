"""The adapters of one request, as the inputs of the engines that they change."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mc_runtime.backends.base import Array
from mc_runtime.bundle.engines import LORA_SUFFIX, Engine, lora_inputs
from mc_runtime.bundle.manifest import Component, Manifest
from mc_runtime.errors import RequestError, named
from mc_runtime.lora.adapter import Adapter

_MEND = "build the bundle again with `mc-runtime build … --lora-rank"


@dataclass(frozen=True, eq=False)
class ActiveLora:
    """Adapters with their scales, stacked; without any, every engine is the plain one.

    Attributes:
        scales: by name.
        digest: of adapters and scales; empty without any.
        inputs: of every engine that they change, by the name of the engine it stands in for.
    """

    scales: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""
    inputs: Mapping[Component, Mapping[str, Array]] = field(default_factory=dict)

    def engine(self, component: Component) -> Component:
        """The engine to run: the one that takes adapters only where these change it."""
        return component + LORA_SUFFIX if component in self.inputs else component

    def of(self, component: Component) -> Mapping[str, Array]:
        """The further inputs of that engine."""
        return self.inputs.get(component, {})


PLAIN = ActiveLora()
"""No adapters."""


def activate(manifest: Manifest, chosen: Sequence[tuple[Adapter, float]]) -> ActiveLora:
    """Stack adapters for the engines of a bundle; their deltas add up, each times its scale.

    Raises:
        RequestError: as `check_fit`.
    """
    chosen = [(adapter, scale) for adapter, scale in chosen if scale]
    if not chosen:
        return PLAIN
    check_fit(manifest, [adapter for adapter, _ in chosen])
    stacked = {component: _stacked(engine, chosen) for component, engine in _takers(manifest).items()}
    digest = hashlib.sha256(repr([(adapter.digest, float(scale)) for adapter, scale in chosen]).encode()).hexdigest()
    return ActiveLora(
        {adapter.name: scale for adapter, scale in chosen}, digest, {name: found for name, found in stacked.items() if found}
    )


def check_fit(manifest: Manifest, adapters: Sequence[Adapter]) -> None:
    """Whether a bundle's engines take these adapters together.

    Raises:
        RequestError: the bundle takes none, or none of that rank; an adapter changes a layer that no engine takes one for.
    """
    takers = _takers(manifest)
    ranks = sum(adapter.rank for adapter in adapters)
    if not takers:
        raise RequestError(f"this bundle takes no LoRA; {_MEND} {ranks}`")
    largest = min(group.rank for engine in takers.values() for group in engine.lora)
    if ranks > largest:
        names = ", ".join(named(adapter.name) for adapter in adapters)
        raise RequestError(f"{names}: rank {ranks} together, this bundle takes {largest}; {_MEND} {ranks}`")
    known = {layer: group for engine in takers.values() for group in engine.lora for layer in group.layers}
    for adapter in adapters:
        for layer, (down, up) in adapter.layers.items():
            if layer not in known:
                raise RequestError(
                    f"{named(adapter.name)}: {named(layer)} is no layer that this bundle adapts; is it for another model?"
                )
            wanted = (known[layer].out_features, known[layer].in_features)
            if (len(up), down.shape[1]) != wanted:
                raise RequestError(
                    f"{named(adapter.name)}: {layer} is {wanted[0]}x{wanted[1]} here, the adapter's {len(up)}x{down.shape[1]}; "
                    "is it for another model?"
                )


def _takers(manifest: Manifest) -> dict[Component, Engine]:
    """The engines that take adapters, by the names of those they stand in for."""
    return {name.removesuffix(LORA_SUFFIX): engine for name, engine in manifest.engines.items() if engine.lora}


def _stacked(engine: Engine, chosen: Sequence[tuple[Adapter, float]]) -> dict[str, Array]:
    """The engine's inputs, adapters one behind the other along the rank; none where no adapter changes one of its layers."""
    changed = any(layer in adapter.layers for adapter, _ in chosen for group in engine.lora for layer in group.layers)
    if not changed:
        return {}
    inputs: dict[str, Array] = {}
    for group, (down_name, up_name) in zip(engine.lora, lora_inputs(engine.lora), strict=True):
        downs, ups = np.zeros(group.down_shape, np.float32), np.zeros(group.up_shape, np.float32)
        for index, layer in enumerate(group.layers):
            start = 0
            for adapter, scale in chosen:
                if layer in adapter.layers:
                    down, up = adapter.layers[layer]
                    rows = slice(start, start + len(down))
                    downs[index, rows], ups[index, :, rows] = down, up * np.float32(scale)
                    start += len(down)
        inputs |= {down_name: downs, up_name: ups}
    return inputs
