"""Stage 2: the planner alone learns to draw, cell by cell, what its caption asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from examples.shapes import data
from examples.shapes.fit import Fit, fit
from examples.shapes.models import CONFIG, GRID, PLANNER_WIDTH
from mc_export.model.planner import Planner, PlannerStates
from mc_export.reference.prompts import encode_for_planner

FINENESS = 2
"""Labels along each side of a canvas cell."""
CLASSES = 1 + len(data.COLOURS) * len(data.KINDS)


class Prompts(NamedTuple):
    """Captions as the planner takes them."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    canvas_positions: Tensor

    def rows(self, chosen: Tensor) -> Prompts:
        """Some of the captions."""
        return Prompts(self.ids[chosen], self.mask[chosen], self.positions[:, chosen], self.canvas_positions[:, chosen])


def tokenize(tokenizer: Qwen2Tokenizer, captions: Sequence[str]) -> Prompts:
    """`captions` in chat form with their positions, padded to the longest."""
    encoded = encode_for_planner(tokenizer, CONFIG, list(captions), CONFIG.canvas.grid)
    names = ("input_ids", "attention_mask", "position_ids", "canvas_position_ids")
    return Prompts(*(encoded[name] for name in names))


def labels(scene: data.Scene) -> np.ndarray:
    """Which coloured shape covers each part of each cell of the canonical layout, `[GRID * GRID, FINENESS ** 2]`."""
    image = Image.new("L", (data.SIDE, data.SIDE))
    pen = ImageDraw.Draw(image)
    for shape in scene.slots():
        label = 1 + data.COLOURS.index(shape.colour) * len(data.KINDS) + data.KINDS.index(shape.kind)
        for polygon in data.outline(shape):
            pen.polygon(polygon, fill=label)
    stride = data.SIDE // (GRID * FINENESS)
    parts = np.asarray(image)[stride // 2 :: stride, stride // 2 :: stride]
    return parts.reshape(GRID, FINENESS, GRID, FINENESS).transpose(0, 2, 1, 3).reshape(GRID * GRID, FINENESS**2)


class Labeller(nn.Module):
    """The planner and a linear head on its canvas; the head is a training aid and is not shipped."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner
        self.head = nn.Linear(PLANNER_WIDTH, FINENESS**2 * CLASSES)

    def forward(self, prompts: Prompts) -> Tensor:
        """Logits `[B, GRID * GRID, FINENESS ** 2, CLASSES]`."""
        canvas = self.planner(*prompts).canvas
        return self.head(canvas.flatten(1, 3)).unflatten(-1, (FINENESS**2, CLASSES))


def train_planner(planner: Planner, tokenizer: Qwen2Tokenizer, work: Path, seed: int, steps: int, batch: int = 96) -> None:
    """Trains language model and canvas tokens in place; the vision tower stays as it was initialised."""
    planner.qwen.visual.requires_grad_(False)
    rng = random.Random(seed + 1)
    training, held_out = data.split()
    scenes = data.sample(training, steps * batch, rng)
    row_of = {scene: row for row, scene in enumerate(training)}
    order = torch.tensor([row_of[scene] for scene in scenes])
    prompts = tokenize(tokenizer, [scene.caption for scene in training])
    targets = torch.from_numpy(np.stack([labels(scene) for scene in training]))
    unseen = data.sample(held_out, 256, rng)
    unseen_prompts = tokenize(tokenizer, [scene.caption for scene in unseen])
    unseen_targets = torch.from_numpy(np.stack([labels(scene) for scene in unseen])).long()
    weights = torch.ones(CLASSES)
    weights[0] = 0.3
    torch.manual_seed(seed + 1)
    labeller = Labeller(planner)

    def loss_at(step: int) -> Tensor:
        rows = order[step * batch : (step + 1) * batch]
        return F.cross_entropy(labeller(prompts.rows(rows)).flatten(0, 2), targets[rows].long().flatten(), weights)

    def probe(module: nn.Module) -> str:
        right = module(unseen_prompts).argmax(-1) == unseen_targets
        return f"held-out parts {right.float().mean():.4f}, whole layouts {right.flatten(1).all(1).float().mean():.3f}"

    fit(Fit("planner", steps, lr=2e-3, probe_every=200), labeller, loss_at, work, seed, probe)


@torch.no_grad()
def plan_all(planner: Planner, prompts: Prompts, batch: int = 256) -> PlannerStates:
    """The planner's states for all `prompts`."""
    parts = [planner(*prompts.rows(rows)) for rows in torch.arange(len(prompts.ids)).split(batch)]
    return PlannerStates(torch.cat([p.context for p in parts]), torch.cat([p.canvas for p in parts]))
