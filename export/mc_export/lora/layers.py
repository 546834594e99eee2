"""The linear layers of an engine that an adapter may change, and what checkpoints call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mc_export.backbones.fused import FusedLinear
from mc_export.model.lora import CanvasLoraLinear, CanvasRows


@dataclass(frozen=True)
class Place:
    """A layer's place among the stacked inputs: `down[group][index]` is its A, `up[group][index]` its B."""

    group: int
    index: int


class GivenAdapter:
    """The adapter of the pass under way; a plain object, so that tracing sees no assignment to a module.

    Attributes:
        downs: one a group, `[layers, rank, in]`.
        ups: one a group, `[layers, out, rank]`.
    """

    downs: Sequence[Tensor] = ()
    ups: Sequence[Tensor] = ()


class AdaptedLinear(nn.Module):
    """``base(x) + B A x``, with A and B of the adapter given to the pass; where there are several, side by side.

    Args:
        base: a linear layer, or the LoRA layer of the checkpoint's own planner.
        places: of its A and B; as many as layers of the checkpoint were fused into it.
        given: shared by all layers of an engine.
        rows: where the canvas begins, for a layer that is adapted from there on only.
    """

    def __init__(self, base: nn.Module, places: Sequence[Place], given: GivenAdapter, rows: CanvasRows | None) -> None:
        super().__init__()
        self.base = base
        self.places = tuple(places)
        self._given = given
        self._rows = rows

    @property
    def weight(self) -> Tensor:
        """The linear layer's own, which models ask for its dtype."""
        weight: Tensor = linear_of(self.base).weight
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`; some models name the argument, as `nn.Linear` does."""
        output: Tensor = self.base(input)
        if self._rows is None:
            return output + self._delta(input)
        start = self._rows.start
        return torch.cat([output[:, :start], output[:, start:] + self._delta(input[:, start:])], dim=1)

    def _delta(self, x: Tensor) -> Tensor:
        deltas = []
        for place in self.places:
            down, up = self._given.downs[place.group][place.index], self._given.ups[place.group][place.index]
            deltas.append((x @ down.to(x.dtype).T) @ up.to(x.dtype).T)
        return deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=-1)


@dataclass(frozen=True)
class Found:
    """A linear layer below a module: where it is, what it stands for, and (in, out) of each layer that it stands for."""

    path: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]


def adaptable_layers(module: nn.Module, homes: Mapping[str, str]) -> list[Found]:
    """The linear layers of all blocks: those with a number in their name. What surrounds the blocks is not adapted.

    A `FusedLinear` stands for the layers it was made of.

    Args:
        module: the engine's program.
        homes: submodule to what checkpoints call it.
    """
    found = []
    for home, called in homes.items():
        for name, layer in module.get_submodule(home).named_modules():
            inside = name.split(".")
            if not isinstance(layer, (nn.Linear, CanvasLoraLinear)) or inside[-1] == "base":
                continue
            linear = linear_of(layer)
            sources: Mapping[str, int] = linear.sources if isinstance(linear, FusedLinear) else {}
            if not sources and any(part.isdigit() for part in inside):
                sources = {f"{called}.{name}": linear.out_features}
            if sources:
                shapes = tuple((linear.in_features, width) for width in sources.values())
                found.append(Found(f"{home}.{name}", tuple(sources), shapes))
    return found


def linear_of(layer: nn.Module) -> nn.Linear:
    """The linear layer itself, without the LoRA that the checkpoint has for it."""
    linear = layer.base if isinstance(layer, CanvasLoraLinear) else layer
    assert isinstance(linear, nn.Linear)
    return linear
