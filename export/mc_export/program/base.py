"""What every engine program says of itself: its inputs and outputs by name, and how far each dynamic dimension reaches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from mc_runtime.bundle.dimensions import extents_in, sizes_of
from mc_runtime.bundle.engines import LoraGroup
from mc_runtime.bundle.manifest import Tensor

if TYPE_CHECKING:
    from mc_export.model.lora import CanvasRows

Extents = Mapping[str, int]
"""Dynamic dimension to its size."""


@dataclass(frozen=True)
class Axis:
    """A dynamic dimension: sizes from `min` to `max`, all multiples of `multiple`.

    `example` is the size a program is exported at. It is at least 2 cells and differs from its neighbours', so that the
    exporter neither bakes it in nor takes two dimensions for one.
    """

    name: str
    min: int
    max: int
    example: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if not self.min <= self.example <= self.max:
            raise ValueError(f"axis {self.name}: example {self.example} is not within {self.min}..{self.max}")
        for size in (self.min, self.max, self.example):
            if size % self.multiple:
                raise ValueError(f"axis {self.name}: {size} is no multiple of {self.multiple}")
        if self.example // self.multiple < 2:
            raise ValueError(f"axis {self.name}: an example of one cell would be baked in")


class Program(nn.Module, ABC):
    """One engine as a torch module. The parameters of `forward` are the inputs' names, its results the outputs in order.

    Attributes:
        component: the engine's name in the bundle.
        inputs: names, dtypes and shapes; a string dimension is dynamic: one of `axes`, or a multiple of one, such as `8*H`.
        outputs: the same; their dynamic dimensions may also have names of their own.
        axes: the dynamic dimensions.
        adaptable: submodules whose blocks a LoRA may adapt, and what checkpoints call them (see `mc_export.lora.layers`).
        groups: the layers that take a LoRA among the inputs.
    """

    component: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    axes: dict[str, Axis]
    adaptable: Mapping[str, str] = MappingProxyType({})
    groups: tuple[LoraGroup, ...] = ()

    @property
    def core(self) -> Program:
        """The program whose own forward keeps float32 where what is below it does not: itself, or the one it wraps."""
        return self

    def adapted_rows(self, path: str) -> CanvasRows | None:
        """Where the rows begin that a LoRA of the layer at `path` acts on; None for all."""
        return None

    @abstractmethod
    def example(self, extents: Extents, seed: int = 0) -> dict[str, torch.Tensor]:
        """Seeded inputs like those of real requests, at these sizes of the dynamic dimensions."""

    @property
    def example_extents(self) -> dict[str, int]:
        """The sizes the program is exported at."""
        return {axis.name: axis.example for axis in self.axes.values()}

    def check_extents(self) -> Iterator[dict[str, int]]:
        """Sizes an engine is checked at, other than the exported ones: one small request, and several odd larger ones."""
        axes = list(self.axes.values())
        small = {axis.name: max(axis.min, (4 if axis.example == 3 * axis.multiple else 3) * axis.multiple) for axis in axes}
        yield {name: 1 if name in SINGLE else size for name, size in small.items()}
        yield {axis.name: min(axis.max, axis.example + axis.multiple * (1 + index)) for index, axis in enumerate(axes)}

    def extents_of(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """The sizes of the dynamic dimensions in these inputs."""
        found: dict[str, int] = {}
        for spec in self.inputs:
            found |= extents_in(spec.shape, inputs[spec.name].shape)
        return found

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name, without gradients."""
        with torch.inference_mode():
            outputs = self(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}


SINGLE = frozenset({"B", "G"})
"""Dimensions that are 1 in the most common request."""


def float_tensor(name: str, *shape: int | str) -> Tensor:
    """A float32 input or output."""
    return Tensor(name=name, dtype="float32", shape=shape)


def int_tensor(name: str, *shape: int | str) -> Tensor:
    """An int64 input or output."""
    return Tensor(name=name, dtype="int64", shape=shape)


def shape_of(spec: Tensor, extents: Extents) -> tuple[int, ...]:
    """The spec's shape with its dynamic dimensions filled in."""
    return sizes_of(spec.shape, extents)


def right_padded_mask(batch: int, length: int) -> torch.Tensor:
    """An attention mask `[batch, length]` whose rows have different real lengths; the first is full."""
    lengths = torch.tensor([max(1, length - 2 * row) for row in range(batch)])
    return (torch.arange(length)[None] < lengths[:, None]).to(torch.int64)
