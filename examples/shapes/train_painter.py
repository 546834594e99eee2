"""Stage 3: connectors and backbone learn to paint, by rectified flow, what the frozen planner has drawn."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from examples.shapes import data
from examples.shapes.fit import Fit, fit
from examples.shapes.train_autoencoder import render, to_signal
from examples.shapes.train_planner import plan_all, tokenize
from mc_export.backbones.sana import Sana
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.injection import CanvasBackbone
from mc_export.model.planner import Planner, PlannerStates

log = logging.getLogger("shapes")

DROPOUT = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
DRAWS = 2
"""Draws of noise and time for each caption of a batch; the request-only half of the connector runs once for all."""


class Painter(nn.Module):
    """What is trained here: the backbone and both connectors."""

    def __init__(self, backbone: SanaTransformer2DModel, canvas: CanvasModel) -> None:
        super().__init__()
        self.backbone = CanvasBackbone(Sana(), backbone, canvas.canvas_connector)
        assert canvas.context_connector is not None
        self.context_connector = canvas.context_connector

    def prepare(self, states: PlannerStates) -> tuple[Tensor, Tensor]:
        """The request-only half: (context, canvas)."""
        assert self.backbone.connector is not None
        return self.context_connector(states.context), self.backbone.connector.draw(states.canvas)

    def forward(self, sample: Tensor, time: Tensor, context: Tensor, mask: Tensor, canvas: Tensor | None) -> Tensor:
        """Velocity of `sample` `[B, C, h, w]` at `time` `[B]` in [0, 1]."""
        velocity: Tensor = self.backbone(sample, 1000 * time, context, mask, canvas)
        return velocity


def encode_all(autoencoder: AutoencoderDC, scenes: list[data.Scene], rng: random.Random, batch: int = 256) -> Tensor:
    """Latents of one picture for every scene, scaled to unit variance."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(scenes), batch):
            parts.append(autoencoder.encode(to_signal(render(scenes[start : start + batch], rng))).latent)
    return torch.cat(parts) * autoencoder.config.scaling_factor


def train_painter(
    painter: Painter,
    planner: Planner,
    autoencoder: AutoencoderDC,
    tokenizer: Qwen2Tokenizer,
    work: Path,
    seed: int,
    steps: int,
    probe: Callable[[nn.Module], str],
    pictures: int = 24_000,
    captions: int = 32,
) -> None:
    """Trains in place; `captions` of them a step, `DRAWS` times each."""
    rng = random.Random(seed + 2)
    training, _ = data.split()
    scenes = data.sample(training, pictures, rng)
    latents = encode_all(autoencoder, scenes, rng)
    prompts = tokenize(tokenizer, ["", *(scene.caption for scene in training)])
    plans = plan_all(planner, prompts)
    row_of = {scene: row for row, scene in enumerate(training, start=1)}
    row_of_picture = torch.tensor([row_of[scene] for scene in scenes])
    log.info("painter: %d latents (variance %.2f) of %d captions", len(latents), latents.var(), len(training))

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(latents), (captions,))
        rows = torch.where(torch.rand(captions) < DROPOUT, 0, row_of_picture[chosen])
        context, canvas = painter.prepare(PlannerStates(plans.context[rows], plans.canvas[rows]))
        context, canvas, mask, latent = (
            tensor.repeat_interleave(DRAWS, 0) for tensor in (context, canvas, prompts.mask[rows], latents[chosen])
        )
        noise = torch.randn_like(latent)
        time = torch.randn(len(latent)).sigmoid()
        mix = time[:, None, None, None]
        velocity = painter((1 - mix) * latent + mix * noise, time, context, mask, canvas)
        return F.mse_loss(velocity.float(), noise - latent)

    plan = Fit("painter", steps, lr=1.5e-3, warmup=200, probe_every=500, average=0.998)
    fit(plan, painter, loss_at, work, seed + 2, probe)
