"""Engines in the manifest: what runs them, their files, their signature, their measured error and the LoRAs they take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from mc_runtime.errors import shown


class Precision(StrEnum):
    """What an engine computes in; its inputs and outputs stay float32 and int64."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


_DIMENSION = re.compile(r"(?:[1-9]\d{0,5}\*)?[A-Za-z_]\w{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One engine input or output; a string dimension is dynamic: a name, equal ones equal sizes, or a multiple, `8*H`."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, int) and size < 1:
                raise ValueError(f"shape: expected sizes of at least 1, found {size}")


STEP = "step"
STEP_FIRST = "step_first"
STEP_REST = "step_rest"
"""A step cut behind its first block, in the place of `step` where a request keeps residuals between steps."""

STEPS = (STEP, STEP_FIRST, STEP_REST)

LORA_SUFFIX = "_lora"
"""Of the engine that stands in for another one, `step_lora` for `step`, where a request has adapters that change it."""


@dataclass(frozen=True, kw_only=True)
class LoraGroup:
    """Layers of one shape that an adapter may change: they share two inputs of their engine.

    Attributes:
        layers: as checkpoints and PEFT name them, such as `transformer.transformer_blocks.0.attn1.to_q`.
        rank: the largest of all adapters of a request together.
    """

    layers: tuple[str, ...]
    rank: int
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        if not self.layers or min(self.rank, self.in_features, self.out_features) < 1:
            raise ValueError("lora: expected layers, a rank and widths")

    @property
    def down_shape(self) -> tuple[int, int, int]:
        """Of all layers' A."""
        return len(self.layers), self.rank, self.in_features

    @property
    def up_shape(self) -> tuple[int, int, int]:
        """Of all layers' B."""
        return len(self.layers), self.out_features, self.rank


def lora_inputs(groups: Sequence[LoraGroup]) -> tuple[tuple[str, str], ...]:
    """The names of the inputs of an engine's groups: A and B of each."""
    return tuple((f"lora_down_{index}", f"lora_up_{index}") for index in range(len(groups)))


@dataclass(frozen=True, kw_only=True)
class MeasuredError:
    """An engine against its torch module, over the shapes it was run at (each a map of dimension to size).

    `of` says what was run: the engine, or, where the building machine cannot run it (a plan for a GPU it lacks), the graph that
    it was made of, in the same precision.
    """

    max_abs: float
    relative_l2: float
    shapes: tuple[dict[str, int], ...] = ()
    of: Literal["engine", "graph"] = "engine"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One component: the library that runs it, its files (the first is the one to load) and its signature."""

    target: str
    precision: Precision
    files: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    error: MeasuredError | None = None
    options: dict[str, Any] = field(default_factory=dict)
    lora: tuple[LoraGroup, ...] = ()

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: an engine has at least one file")
        for listed in (*self.inputs, *self.outputs):
            for size in listed.shape:
                if isinstance(size, str) and not _DIMENSION.fullmatch(size):
                    raise ValueError(f"{listed.name}: expected sizes, names or multiples such as 8*H, found {shown(size)}")
        layers = [layer for group in self.lora for layer in group.layers]
        if len(set(layers)) < len(layers):
            raise ValueError("lora: a layer is listed twice")
        for group, names in zip(self.lora, lora_inputs(self.lora), strict=True):
            for name, shape in zip(names, (group.down_shape, group.up_shape), strict=True):
                tensor = self.input(name)
                if tensor is None or tensor.shape != shape:
                    raise ValueError(f"lora: the engine has no input {name!r} of the shape {list(shape)}")

    def input(self, name: str) -> Tensor | None:
        """The input of that name, or None where this engine takes none."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def output(self, name: str) -> Tensor | None:
        """The output of that name, or None where this engine gives none."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)
