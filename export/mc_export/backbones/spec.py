"""What a backbone's spec is made of: small records, each said once by the file of its kind."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mc_runtime.bundle.manifest import Component, ConditionSource, Precision


@dataclass(frozen=True)
class Condition:
    """A further input of a backbone's step, beside latents, timestep, context and canvas.

    Attributes:
        name: of the step's input, and of the keyword that :meth:`Backbone.arguments` gets.
        shape: after the batch (and after the branches, if it has them); a string is a dynamic dimension. The latents' own
            dimensions are `T`, `H` and `W`.
        source: what the runtime fills it with.
        per_branch: whether every guidance branch has its own.
        embedded: whether it enters with the patch embedding alone, so that nothing behind the first block reads its numbers.
    """

    name: str
    shape: tuple[int | str, ...]
    source: ConditionSource
    per_branch: bool = False
    embedded: bool = False


@dataclass(frozen=True)
class TextStates:
    """What a checkpoint's own text encoders make of prompts: context `[B, L, D]`, and a pooled vector `[B, P]` or None."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class TextTokens:
    """Ids and masks ``[B, L_i]``, one an encoder.

    ``context_mask`` is ``[B, L]``; ``select`` ``[L]`` are the rows that become context, all if None.
    """

    input_ids: tuple[Tensor, ...]
    attention_masks: tuple[Tensor, ...]
    context_mask: Tensor
    select: Tensor | None = None

    def engine_inputs(self) -> dict[str, Tensor]:
        """As the `text_encoder` engine names them."""
        inputs: dict[str, Tensor] = {}
        for index, (ids, mask) in enumerate(zip(self.input_ids, self.attention_masks, strict=True)):
            suffix = f"_{index + 1}" if index else ""
            inputs |= {f"input_ids{suffix}": ids, f"attention_mask{suffix}": mask}
        return inputs if self.select is None else inputs | {"select": self.select}


@dataclass(frozen=True)
class EncoderFolders:
    """A text encoder of a pipeline: the folder of its model and that of its tokenizer."""

    model: str
    tokenizer: str


@dataclass(frozen=True)
class Limit:
    """A target and a precision in which an engine of a backbone cannot be built, or would not serve.

    Attributes:
        target, precision: as in the build's options.
        reason: one clause, for the error of a build and for docs/support.md.
        component: the engine.
    """

    target: str
    precision: Precision
    reason: str
    component: Component = "step"
