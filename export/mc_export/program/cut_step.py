"""A step cut behind the backbone's first block, so that what the other blocks add can be kept from an earlier step.

    step_first   patch embedding, canvas and first block; how much they differ from those that the kept residual belongs to;
                 the step's end, with the kept residual in the other blocks' place
    step_rest    the other blocks, whose residual is kept from now on, and the step's end, with it

The test is that of First Block Cache (ParaAttention; diffusers' `apply_first_block_cache`): the mean absolute change of what
the first block adds, relative to its mean when the residual was computed. Here the canvas residual, which enters between patch
embedding and first block, is part of it, so that a canvas that changes over the steps is seen, and every sample has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.backbones.stream import HIDDEN, BlockStream
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Extents, float_tensor
from mc_export.program.step import StepProgram, per_branch
from mc_runtime.bundle.engines import STEP_FIRST, STEP_REST
from mc_runtime.errors import CheckpointError

_SMALLEST_MEAN = 1e-6


class _Pass:
    """What the hooks of a pass share; a plain object, so that tracing sees no assignment to a module.

    All tensors have a row a branch, `[N, ...]`: `embedded`, the target's tokens before the canvas; `change`, what canvas and
    first block added; `given`, what `step_first` gave; `kept` and `residual`, the other blocks' residual before and after;
    `keep`, whether a row keeps it.
    """

    sample: Tensor
    sizes: Mapping[str, Any]
    embedded: Tensor
    change: Tensor
    given: Mapping[str, Tensor]
    kept: Tensor
    residual: Tensor
    keep: Tensor


class CutStepProgram(StepProgram):
    """What both parts have in common.

    Raises:
        ValueError: the backbone's blocks cannot be cut.
        CheckpointError: the model has one block, or its width is no multiple of a token's cells.
    """

    def __init__(self, backbone: CanvasBackbone, context_dim: int, **limits: int) -> None:
        super().__init__(backbone, context_dim, **limits)
        adapter, config = backbone.backbone, backbone.model.config
        if adapter.stream is None:
            raise ValueError(f"{adapter.name}: {adapter.uncut}")
        self.stream: BlockStream = adapter.stream
        self.width, cells = adapter.width(config), math.prod(adapter.patch(config))
        if self.width % cells:
            raise CheckpointError(f"the model is {self.width} wide, no multiple of the {cells} cells of a token")
        if sum(len(self._blocks(name)) for name in self.stream.lists) < 2:
            raise CheckpointError("the model has one block, behind which there is nothing to keep; build it without --cache")
        shapes = self.stream.shapes(self.width, cells, config)
        self.state = tuple(float_tensor(name, "B", "G", *shape) for name, shape in shapes.items())
        self._cells = shapes[HIDDEN]
        self._pass = _Pass()

    def of_target(self, name: str) -> Any:
        """A tensor of the target's hidden states."""
        return float_tensor(name, "B", "G", *self._cells)

    def _blocks(self, name: str) -> nn.ModuleList:
        blocks = self.backbone.model.get_submodule(name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Tells the hooks of the pass's sizes."""
        found = ((spec.shape, inputs[spec.name].shape) for spec in self.inputs)
        self._pass.sizes = {
            name: size for shape, sizes in found for name, size in zip(shape, sizes, strict=True) if isinstance(name, str)
        }
        self._pass.sample = inputs["sample"]

    def _tensors(self, output: Any) -> dict[str, Tensor]:
        return self.stream.tensors(output, self._pass.sizes, self.backbone.model.config)

    def _output(self, tensors: Mapping[str, Tensor]) -> Any:
        return self.stream.output(tensors, self.width, self.backbone.model.config)


class FirstStepProgram(CutStepProgram):
    """`step_first`: the step as far as its first block, and its end with the residual `kept_residual`.

    Beside a step's own it takes `kept_change`, what canvas and first block added where that residual was computed. It gives the
    hidden states behind the first block (`hidden`, and what else the backbone's blocks hand on), what canvas and first block
    add here (`change`), and how much that differs from `kept_change`: `difference` `[B]`, the largest of a sample's branches.
    """

    component = STEP_FIRST

    def __init__(self, backbone: CanvasBackbone, context_dim: int, **limits: int) -> None:
        super().__init__(backbone, context_dim, **limits)
        self.inputs = (*self.inputs, self.of_target("kept_change"), self.of_target("kept_residual"))
        self.outputs = (*self.outputs, *self.state, self.of_target("change"), float_tensor("difference", "B"))
        model, lists = backbone.model, self.stream.lists
        first = self._blocks(lists[0])[0]
        for name in lists:
            model.set_submodule(name, nn.ModuleList([first] if name == lists[0] else []))
        first.register_forward_hook(self._after_first)
        patch_embedding = model.get_submodule(backbone.backbone.patch_embedding)
        patch_embedding.register_forward_hook(self._before_canvas, prepend=True)

    def forward(  # type: ignore[override]  # a step's inputs go on to it as they are
        self, kept_change: Tensor, kept_residual: Tensor, **inputs: Tensor
    ) -> tuple[Tensor, ...]:
        self._begin({**inputs, "kept_change": kept_change, "kept_residual": kept_residual})
        self._pass.kept = kept_residual.flatten(0, 1)
        ended = super().forward(**inputs)
        rows = inputs["guidance"].shape[:2]
        hidden = [self._pass.given[spec.name].float().unflatten(0, rows) for spec in self.state]
        change = self._pass.change.unflatten(0, rows)
        return (*ended, *hidden, change, relative_change(change, kept_change))

    def _before_canvas(self, _: nn.Module, __: Any, tokens: Tensor) -> None:
        grid = self.backbone.backbone.target_grid(tokens, self._pass.sample, self.backbone.model.config)
        sizes = [self._pass.sizes[name] for name in self._cells if isinstance(name, str)]
        self._pass.embedded = grid.reshape(grid.shape[0], *sizes, -1)

    def _after_first(self, _: nn.Module, __: Any, output: Any) -> Any:
        tensors = self._tensors(output)
        hidden = tensors[HIDDEN]
        self._pass.given = tensors
        self._pass.change = hidden.float() - self._pass.embedded.float()
        return self._output({**tensors, HIDDEN: hidden + self._pass.kept.to(hidden.dtype)})


class RestStepProgram(CutStepProgram):
    """`step_rest`: the step from its first block on, of what `step_first` gave.

    Samples whose `keep` `[B]` is 1 end as they do in `step_first`, and keep `kept_change` and `kept_residual`: they do not
    depend on what others in the batch ask for.

    Args:
        backbone: without a canvas connector; the canvas is in the hidden states.
        context_dim, limits: a step's own.
    """

    component = STEP_REST

    def __init__(self, backbone: CanvasBackbone, context_dim: int, **limits: int) -> None:
        super().__init__(backbone, context_dim, **limits)
        if backbone.connector is not None:
            raise ValueError("the canvas enters before the first block: give the rest a backbone without its connector")
        embedded = {condition.name for condition in self.conditions if condition.embedded}
        self.inputs = (
            *(spec for spec in self.inputs if spec.name not in embedded),
            *self.state,
            *(self.of_target(name) for name in ("change", "kept_change", "kept_residual")),
            float_tensor("keep", "B"),
        )
        self.outputs = (*self.outputs, self.of_target("next_change"), self.of_target("next_residual"))
        self._blocks(self.stream.lists[0])[0] = _Given(self)
        last = [block for name in self.stream.lists for block in self._blocks(name)][-1]
        last.register_forward_hook(self._after_last)

    def forward(  # type: ignore[override]  # a step's inputs go on to it as they are
        self, change: Tensor, kept_change: Tensor, kept_residual: Tensor, keep: Tensor, **inputs: Tensor
    ) -> tuple[Tensor, ...]:
        given = {"change": change, "kept_change": kept_change, "kept_residual": kept_residual, "keep": keep}
        self._begin({**inputs, **given})
        rows = inputs["guidance"].shape[:2]
        ones = [1] * len(self._cells)
        self._pass.given = {spec.name: inputs.pop(spec.name).flatten(0, 1) for spec in self.state}
        self._pass.kept = kept_residual.flatten(0, 1)
        self._pass.keep = per_branch(keep, rows[1]).unflatten(0, (-1, *ones)) > 0
        ended = super().forward(**inputs, **self._embedded(inputs["sample"], rows))
        next_change = torch.where(keep.unflatten(0, (-1, 1, *ones)) > 0, kept_change, change)
        return (*ended, next_change, self._pass.residual.unflatten(0, rows))

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Every other sample keeps its residual."""
        example = super().example(extents, seed)
        example["keep"] = (torch.arange(len(example["keep"])) % 2).float()
        return example

    def _embedded(self, sample: Tensor, rows: torch.Size) -> dict[str, Tensor]:
        """Zeros for conditions whose numbers are in the hidden states already: the model's forward asks for their sizes."""
        sizes = self._pass.sizes
        return {
            condition.name: sample.new_zeros(
                *rows[: 1 + condition.per_branch],
                *(size if isinstance(size, int) else sizes[size] for size in condition.shape),
            )
            for condition in self.conditions
            if condition.embedded
        }

    def given_output(self, dtype: torch.dtype) -> Any:
        """What the first block would return."""
        return self._output({name: tensor.to(dtype) for name, tensor in self._pass.given.items()})

    def _after_last(self, _: nn.Module, __: Any, output: Any) -> Any:
        tensors = self._tensors(output)
        final, state = tensors[HIDDEN], self._pass
        start = state.given[HIDDEN].to(final.dtype)
        state.residual = torch.where(state.keep, state.kept, (final - start).float())
        return self._output({**tensors, HIDDEN: torch.where(state.keep, start + state.kept.to(final.dtype), final)})


class _Given(nn.Module):
    """Stands for the first block and gives what it gave."""

    def __init__(self, program: RestStepProgram) -> None:
        super().__init__()
        self._output = program.given_output  # a bound method is no submodule: the program does not hold itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        called = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return self._output(called.dtype)


def relative_change(change: Tensor, kept: Tensor) -> Tensor:
    """How far `change` is from `kept`, both `[B, G, ...]`: mean absolute difference over mean absolute value, the largest of a
    sample's branches, `[B]`."""
    difference = (change - kept).abs().flatten(2).mean(dim=-1)
    return (difference / kept.abs().flatten(2).mean(dim=-1).clamp_min(_SMALLEST_MEAN)).amax(dim=1)
