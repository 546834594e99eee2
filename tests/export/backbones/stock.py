"""A whole stock checkpoint as programs in torch, for parity with the diffusers pipeline of the same folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mc_export.checkpoint import load_checkpoint
from mc_export.program.step import StepProgram
from tests.export.backbones.drive import TextDrive, Told, denoise, schedule_of


class Stock:
    """Its text encoders, step and sampler.

    Args:
        folder: the checkpoint.
        steps: the step count of its schedule.
        scratch: where tokenizers are written.
    """

    def __init__(self, folder: Path, steps: int, scratch: Path) -> None:
        self.checkpoint = load_checkpoint(folder)
        self.backbone, self.config = self.checkpoint.backbone, self.checkpoint.model_config
        model = self.checkpoint.load_model()
        self.schedule = schedule_of(self.backbone, model, self.checkpoint.load_scheduler(), steps)
        self.context = self.backbone.context_preparation(model)
        self.width = self.backbone.prepared_context_width(self.config)
        self.step = StepProgram(self.checkpoint.load_backbone(None), self.width, order=self.schedule.order).eval()
        if self.backbone.encoders:
            encoders, tokenizers = self.checkpoint.load_text_encoders(), self.checkpoint.load_tokenizers()
            self.text = TextDrive(self.backbone, encoders, tokenizers, model, scratch)

    def branches(self, prompts: Sequence[str], negative: Sequence[str] | None) -> list[Told]:
        """Of prompts and, with guidance, of their negative prompts."""
        rows = [self.text(prompts)]
        if negative is not None:
            told = self.text(negative, negative=True)
            rows.append(without(told) if not any(negative) and self.checkpoint.zeroes_empty_negative else told)
        return rows

    def latents(
        self, noise: Tensor, branches: Sequence[Told], scale: float, conditions: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The final ones of unit noise `[B, C, (T,) H, W]`."""
        weights = [scale, 1 - scale] if scale > 1 else [1.0]
        ramp = self.backbone.guidance_ramp_from
        guidance = None
        if ramp is not None:
            scales = torch.linspace(ramp, scale, noise.shape[2])
            guidance = torch.stack([scales, 1 - scales]) if scale > 1 else torch.ones(1, noise.shape[2])
            guidance = guidance.expand(len(noise), -1, -1)
        return denoise(self.step, self.schedule, noise, branches, weights, conditions=conditions, guidance=guidance)


def without(told: Told) -> Told:
    """Zeros in its place."""
    return Told(torch.zeros_like(told.context), told.mask, None if told.pooled is None else torch.zeros_like(told.pooled))
