"""Stage 3: connectors and backbone learn, by rectified flow, to paint what the frozen planner drew, beside the original."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from examples.shapes.data import COLOURS, draw
from examples.shapes.edit import data
from examples.shapes.edit.prompts import plan_all, read_instructions, to_pixels
from examples.shapes.edit.train_autoencoder import latents_of
from examples.shapes.fit import Fit, fit
from mc_export.backbones.flux import FluxKontext
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.injection import CanvasBackbone
from mc_export.model.planner import Planner, PlannerStates

log = logging.getLogger("shapes")

GUIDANCE = (1.0, 6.0)
"""Scales that the model is told in training; the data is the same for all of them, so that any serves."""
CHANGED_WEIGHT = 5.0
"""Of a latent cell that the instruction changes; copying the others is soon learned."""
CHANGED = 0.5
"""Difference of a cell's latents from which it counts as changed; group norms spread a little of every change to all cells."""
OTHERWISE = 3
"""Originals of each edit beside the true one, each of them drawn as often: the named shape has any colour in them."""


class Painter(nn.Module):
    """What is trained here: the backbone and all connectors."""

    def __init__(self, backbone: FluxTransformer2DModel, canvas: CanvasModel) -> None:
        super().__init__()
        assert canvas.context_connector is not None
        assert canvas.pooled_connector is not None
        self.backbone = CanvasBackbone(FluxKontext(), backbone, canvas.canvas_connector)
        self.context_connector = canvas.context_connector
        self.pooled_connector = canvas.pooled_connector

    def forward(self, sample: Tensor, time: Tensor, states: PlannerStates, reference: Tensor, guidance: Tensor) -> Tensor:
        """Velocity of `sample` `[B, C, h, w]` at `time` `[B]` in [0, 1], beside the clean latents of the original."""
        assert self.backbone.connector is not None
        mask = torch.ones(states.context.shape[:2])
        velocity: Tensor = self.backbone(
            sample,
            1000 * time,
            self.context_connector(states.context),
            mask,
            self.backbone.connector.draw(states.canvas),
            pooled=self.pooled_connector.of_rows(states.context, mask),
            guidance_scale=guidance,
            reference=reference,
            has_reference=torch.ones(len(sample)),
        )
        return velocity


def otherwise(edit: data.Edit, rng: random.Random) -> Image.Image:
    """The original, but the shape that the instruction names has any colour.

    What comes out is the same. A painter that always had the true original learns which colours become which, pair by pair,
    and paints a pair of a new instruction wrong whatever the canvas says.
    """
    anew = edit.named.shape._replace(colour=rng.choice(COLOURS))
    return draw([anew if shape is edit.named.shape else shape for shape in edit.source])


@torch.no_grad()
@torch.autocast("cpu", dtype=torch.bfloat16)
def encode_all(autoencoder: AutoencoderKL, pictures: Tensor, batch: int = 256) -> Tensor:
    """Latents of u8 `pictures`, scaled to unit variance."""
    return torch.cat([latents_of(autoencoder, part).float() for part in pictures.split(batch)])


def train_painter(
    painter: Painter,
    planner: Planner,
    autoencoder: AutoencoderKL,
    tokenizer: Qwen2Tokenizer,
    work: Path,
    seed: int,
    steps: int,
    probe: Callable[[nn.Module], str],
    edits: int = 9_000,
    batch: int = 32,
) -> None:
    """Trains in place."""
    training, _ = data.split()
    chosen = data.sample(training, edits, random.Random(seed + 2))
    before, after = (to_pixels(pictures) for pictures in zip(*(edit.pictures() for edit in chosen), strict=True))
    instructions = read_instructions(planner, tokenizer, [each.text for each in data.all_instructions()])
    row_of = {instruction: row for row, instruction in enumerate(data.all_instructions())}
    plans = plan_all(planner, instructions, torch.tensor([row_of[edit.instruction] for edit in chosen]), before)
    latents = encode_all(autoencoder, after)
    rng = random.Random(seed + 3)
    originals = (before, *(to_pixels([otherwise(edit, rng) for edit in chosen]) for _ in range(OTHERWISE)))
    references = torch.stack([encode_all(autoencoder, pictures) for pictures in originals])
    changed = (latents - references[0]).abs().amax(dim=1, keepdim=True) > CHANGED
    weights = torch.where(changed, CHANGED_WEIGHT, 1.0)
    share = changed.float().mean()
    log.info("painter: %d edits, latents of variance %.2f, of which %.3f change", len(latents), latents.var(), share)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_at(step: int) -> Tensor:
        rows = torch.randint(len(latents), (batch,))
        latent, noise = latents[rows], torch.randn(batch, *latents.shape[1:])
        time = torch.randn(batch).sigmoid()
        mix = time[:, None, None, None]
        states = PlannerStates(plans.context[rows].float(), plans.canvas[rows].float())
        guidance = torch.empty(batch).uniform_(*GUIDANCE)
        reference = references[torch.randint(len(references), (batch,)), rows]
        velocity = painter((1 - mix) * latent + mix * noise, time, states, reference, guidance)
        error = (velocity.float() - (noise - latent)).square() * weights[rows]
        return error.sum() / weights[rows].expand_as(error).sum()

    plan = Fit("painter", steps, lr=1.5e-3, warmup=100, probe_every=250, average=0.998)
    fit(plan, painter, loss_at, work, seed + 2, probe)
