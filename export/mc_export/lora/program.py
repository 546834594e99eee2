"""An engine's program with an adapter among its inputs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from mc_export.lora.layers import AdaptedLinear, GivenAdapter, Place, adaptable_layers
from mc_export.program.base import Extents, Program, float_tensor
from mc_runtime.bundle.engines import LORA_SUFFIX, LoraGroup, lora_inputs
from mc_runtime.errors import EngineError

_EXAMPLE_SCALE = 0.02


class AdaptedProgram(Program):
    """A program whose blocks' linear layers add a LoRA that comes with the request (LoRA: arXiv 2106.09685).

    Layers of one shape share two inputs, `lora_down_<group>` `[layers, rank, in]` and `lora_up_<group>` `[layers, out, rank]`;
    an adapter's scale is in the latter. Layers and ranks that an adapter does not have are zeros.

    Args:
        program: the engine without adapters; changed in place.
        rank: the largest of all adapters together.

    Raises:
        EngineError: there is nothing to adapt.
    """

    def __init__(self, program: Program, rank: int) -> None:
        super().__init__()
        layers = adaptable_layers(program, program.adaptable)
        if not layers:
            raise EngineError(f"{program.component}: has no layers that a LoRA could adapt; build it without --lora-rank")
        self.component = program.component + LORA_SUFFIX
        self.axes = program.axes
        self.outputs = program.outputs
        self.inner = program
        self._given = GivenAdapter()
        members: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
        groups: dict[tuple[int, int], int] = {}
        for layer in layers:
            places = []
            for name, shape in zip(layer.names, layer.shapes, strict=True):
                places.append(Place(groups.setdefault(shape, len(groups)), len(members[shape])))
                members[shape].append(name)
            home, _, attribute = layer.path.rpartition(".")
            parent = program.get_submodule(home)
            base = program.get_submodule(layer.path)
            adapted = AdaptedLinear(base, places, self._given, program.adapted_rows(layer.path))
            setattr(parent, attribute, adapted)
        self.groups = tuple(
            LoraGroup(layers=tuple(members[shape]), rank=rank, in_features=shape[0], out_features=shape[1]) for shape in groups
        )
        pairs = [
            (float_tensor(down, *group.down_shape), float_tensor(up, *group.up_shape))
            for group, (down, up) in zip(self.groups, lora_inputs(self.groups), strict=True)
        ]
        self.inputs = (*program.inputs, *(tensor for pair in pairs for tensor in pair))

    @property
    def core(self) -> Program:
        """See `Program.core`; the adapter comes in float32 and is cast where a layer adds it."""
        return self.inner.core

    def forward(self, **inputs: Tensor) -> Any:
        pairs = [(inputs.pop(down), inputs.pop(up)) for down, up in lora_inputs(self.groups)]
        self._given.downs, self._given.ups = [down for down, _ in pairs], [up for _, up in pairs]
        return self.inner(**inputs)

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """The program's own, with an adapter that changes every layer."""
        generator = torch.Generator().manual_seed(seed)
        inputs = self.inner.example(extents, seed)
        for group, (down, up) in zip(self.groups, lora_inputs(self.groups), strict=True):
            inputs[down] = torch.randn(group.down_shape, generator=generator) * group.in_features**-0.5
            inputs[up] = torch.randn(group.up_shape, generator=generator) * _EXAMPLE_SCALE
        return inputs
