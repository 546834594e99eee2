"""A checkpoint's programs run in torch the way the runtime runs its engines, to be compared with diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.program.step import StepProgram
from mc_export.program.text_encoder import TextEncoderProgram
from mc_export.prompting import text_prompting
from mc_export.sampler import build_sampler_table
from mc_runtime.prompting.tokenizer import Prompter
from mc_runtime.sampling.tables import Schedule

RunStep = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Told(NamedTuple):
    """What one branch of a batch is told: context `[B, L, D]`, how often its rows count `[B, L]`, a pooled vector or None."""

    context: Tensor
    mask: Tensor
    pooled: Tensor | None


class TextDrive:
    """The runtime's prompting and the `text_encoder` program of a stock checkpoint.

    Args:
        backbone: of the checkpoint.
        encoders, tokenizers: its own.
        model: the published model; what it makes of the context goes into the program.
        folder: where the tokenizers are written.
    """

    def __init__(
        self, backbone: Backbone, encoders: Sequence[nn.Module], tokenizers: Sequence[Any], model: nn.Module, folder: Path
    ) -> None:
        config: Any = model.config
        self.promptings = text_prompting(backbone, tokenizers, folder)
        self.prompters = [Prompter(prompting, folder) for prompting in self.promptings]
        self.program = TextEncoderProgram(
            backbone, encoders, backbone.context_preparation(model), backbone.prepared_context_width(config),
            pooled_dim=backbone.pooled_width(config),
        ).eval()  # fmt: skip

    def __call__(self, prompts: Sequence[str], *, negative: bool = False) -> Told:
        """Reads the prompts as one batch."""
        encoded = [prompter.encode(prompts, negative=negative) for prompter in self.prompters]
        context = next(one for one, spec in zip(encoded, self.promptings, strict=True) if spec.gives_context)
        given = {"select": torch.from_numpy(encoded[0].select)}
        for index, one in enumerate(encoded):
            suffix = f"_{index + 1}" if index else ""
            given[f"input_ids{suffix}"] = torch.from_numpy(one.input_ids)
            given[f"attention_mask{suffix}"] = torch.from_numpy(one.attention_mask)
        outputs = self.program.run({spec.name: given[spec.name] for spec in self.program.inputs})
        return Told(outputs["context"], torch.from_numpy(context.context_mask), outputs.get("pooled"))


def schedule_of(backbone: Backbone, model: nn.Module, scheduler: Any, steps: int, tokens: int | None = None) -> Schedule:
    """The schedule of a checkpoint's scheduler; `tokens` are the latent tokens, where it depends on them."""
    table = build_sampler_table(
        scheduler, max_steps=steps, step_counts=[steps], set_timesteps=backbone.set_timesteps(scheduler),
        timestep_scale=backbone.timestep_scale(model.config),
        token_counts=[tokens] if scheduler.config.get("use_dynamic_shifting") and tokens else [],
    )  # fmt: skip
    return table.schedule(steps, tokens)


def denoise(
    step: StepProgram,
    schedule: Schedule,
    noise: Tensor,
    branches: Sequence[Told],
    weights: Sequence[float],
    *,
    conditions: Mapping[str, Tensor] | None = None,
    guidance: Tensor | None = None,
    run: RunStep | None = None,
) -> Tensor:
    """The final latents, of the noise's shape.

    Args:
        step: the program, of the schedule's order.
        schedule: see :func:`schedule_of`.
        noise: unit noise `[B, C, (T,) H, W]`.
        branches: the prompt's, then the negative prompt's.
        weights: of the branches.
        conditions: further inputs, `[B, ...]` or `[B, G, ...]`.
        guidance: `[B, G, T]` instead of `weights`, where each frame has its own.
        run: what runs a step; the program itself by default.
    """
    batch, longest = len(noise), max(told.context.shape[1] for told in branches)
    state = {"sample": noise * schedule.init_noise_sigma}
    if step.order > 1:
        state["history"] = noise.new_zeros(batch, 2 * (step.order - 1), *noise.shape[1:])
    constant = dict(conditions or {}) | {
        "guidance": torch.tensor(weights).expand(batch, -1) if guidance is None else guidance,
        "context": torch.stack([F.pad(told.context, (0, 0, 0, longest - told.context.shape[1])) for told in branches], dim=1),
        "context_mask": torch.stack([F.pad(told.mask, (0, longest - told.mask.shape[1])) for told in branches], dim=1),
    }
    pooled = [told.pooled for told in branches if told.pooled is not None]
    if pooled:
        constant["pooled"] = torch.stack(pooled, dim=1)
    for timestep, coefficients in zip(schedule.timesteps, schedule.coefficients, strict=True):
        feed = state | constant
        feed["timestep"] = torch.full((batch,), float(timestep))
        feed["coefficients"] = torch.from_numpy(coefficients).expand(batch, -1)
        outputs = (run or step.run)({spec.name: feed[spec.name].contiguous() for spec in step.inputs})
        state["sample"] = outputs["next_sample"]
        if step.order > 1:
            state["history"] = outputs["next_history"]
    return state["sample"]


def assert_same_latents(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-3 of the range of the expected ones."""
    error, spread = (actual - expected).abs(), expected.max() - expected.min()
    assert error.max() <= 1e-3 * spread, f"max {error.max():.2e}, mean {error.mean():.2e}, range {spread:.2f}"
