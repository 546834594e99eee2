"""Stage 1: the planner learns to see, to read, and to draw cell by cell what must come out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from examples.shapes.data import COLOURS, KINDS, SIDE, Shape, outline
from examples.shapes.edit import data
from examples.shapes.edit.models import GRID, WIDTH
from examples.shapes.edit.prompts import Eyes, read_instructions, to_pixels
from examples.shapes.fit import Fit, fit
from mc_export.model.planner import Planner

FINENESS = 2
"""Labels along each side of a canvas cell."""
CLASSES = 1 + len(COLOURS) * len(KINDS)
BACKGROUND_WEIGHT, CHANGED_WEIGHT = 0.3, 3.0
"""Of a part that was empty and stays so, and of one that the instruction changes; all others weigh one."""

PROBED = 256


def labels(shapes: Sequence[Shape]) -> np.ndarray:
    """Which coloured shape covers each part of each cell, `[GRID * GRID, FINENESS ** 2]`."""
    image = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        label = 1 + COLOURS.index(shape.colour) * len(KINDS) + KINDS.index(shape.kind)
        for polygon in outline(shape):
            pen.polygon(polygon, fill=label)
    stride = SIDE // (GRID * FINENESS)
    parts = np.asarray(image)[stride // 2 :: stride, stride // 2 :: stride]
    return parts.reshape(GRID, FINENESS, GRID, FINENESS).transpose(0, 2, 1, 3).reshape(GRID * GRID, FINENESS**2)


class Labelled:
    """Edits as tensors: pictures, rows of their instructions, labels of what must come out, and what each label weighs."""

    def __init__(self, edits: Sequence[data.Edit]) -> None:
        row_of = {instruction: row for row, instruction in enumerate(data.all_instructions())}
        self.rows = torch.tensor([row_of[edit.instruction] for edit in edits])
        self.pictures = to_pixels([edit.pictures()[0] for edit in edits])
        before, after = (
            torch.from_numpy(np.stack([labels(shapes) for shapes in every]))
            for every in ((edit.source for edit in edits), (edit.target for edit in edits))
        )
        self.targets = after
        self.changed = before != after

    def weights(self, chosen: Tensor) -> Tensor:
        """Of the labels of some edits."""
        empty = torch.where(self.targets[chosen] == 0, BACKGROUND_WEIGHT, 1.0)
        return torch.where(self.changed[chosen], CHANGED_WEIGHT, empty)


class Labeller(nn.Module):
    """The planner and a linear head on its canvas; the head is a training aid and is not shipped."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner
        self.head = nn.Linear(WIDTH, FINENESS**2 * CLASSES)

    def forward(self, **prompts: Tensor) -> Tensor:
        """Logits `[B, GRID * GRID, FINENESS ** 2, CLASSES]`."""
        canvas = self.planner(**prompts).canvas
        return self.head(canvas.flatten(1, 3)).unflatten(-1, (FINENESS**2, CLASSES))


def train_planner(
    planner: Planner,
    tokenizer: Qwen2Tokenizer,
    work: Path,
    seed: int,
    steps: int,
    edits: int = 40_000,
    batch: int = 48,
) -> None:
    """Trains language model, vision tower and canvas tokens in place."""
    training, held_out = data.split()

    @cache
    def seen() -> Labelled:
        return Labelled(data.sample(training, edits, random.Random(seed + 1)))

    read = read_instructions(planner, tokenizer, [each.text for each in data.all_instructions()])
    torch.manual_seed(seed + 1)
    labeller = Labeller(planner)
    eyes = Eyes(planner)

    def logits_of(module: nn.Module, edits: Labelled, chosen: Tensor) -> Tensor:
        return module(**read.rows(edits.rows[chosen]), vision=eyes(edits.pictures[chosen]))

    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(edits, (batch,))
        logits, weights = logits_of(labeller, seen(), chosen), seen().weights(chosen)
        each = F.cross_entropy(logits.flatten(0, 2), seen().targets[chosen].long().flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()

    def probe(module: nn.Module) -> str:
        shares = []
        for instructions in (held_out, training):
            probed = Labelled(data.sample(instructions, PROBED, random.Random(seed)))
            right = logits_of(module, probed, torch.arange(PROBED)).argmax(-1) == probed.targets
            changed = probed.changed
            shares.append(f"parts {right.float().mean():.4f}, changed {right[changed].float().mean():.3f}")
        return f"held out: {shares[0]}; instructions of training: {shares[1]}"

    fit(Fit("planner", steps, lr=1.5e-3, probe_every=100), labeller, loss_at, work, seed, probe)
