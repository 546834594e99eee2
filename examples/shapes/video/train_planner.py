"""Stage 2: the planner learns to see, and to draw on its canvas, cell by cell, what its instruction asks for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from examples.shapes import data
from examples.shapes.fit import Fit, fit
from examples.shapes.video.cases import TASKS, Case, sample_cases
from examples.shapes.video.models import GRID, MERGE, PATCH, PLANNER_WIDTH
from examples.shapes.video.reading import Read, Reader, plan
from mc_export.model.planner import Planner

FINENESS = 4
"""Labels along each side of a canvas cell."""
MOMENTS = ((0, 0), (1, 4), (5, 8))
"""The first and the last frame that each latent frame, and so each keyframe, stands for."""
CLASSES = 1 + len(data.COLOURS) * len(data.KINDS)
SEEN_FINENESS = 4
"""Labels along each side of a vision token."""


def labels(shapes: Sequence[data.Shape], parts: int) -> NDArray[np.uint8]:
    """Which coloured shape covers each of `parts` x `parts` parts of a picture; 0 is the ground."""
    image = Image.new("L", (data.SIDE, data.SIDE))
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        label = 1 + data.COLOURS.index(shape.colour) * len(data.KINDS) + data.KINDS.index(shape.kind)
        for polygon in data.outline(shape):
            pen.polygon(polygon, fill=label)
    stride = data.SIDE // parts
    return np.asarray(image)[stride // 2 :: stride, stride // 2 :: stride]


def cell_labels(shapes: Sequence[data.Shape], cells: int, fineness: int) -> NDArray[np.uint8]:
    """The same by cell: `[cells * cells, fineness ** 2]`."""
    parts = labels(shapes, cells * fineness).reshape(cells, fineness, cells, fineness)
    return parts.transpose(0, 2, 1, 3).reshape(cells * cells, fineness**2)


def film_labels(case: Case) -> NDArray[np.uint8]:
    """What the canvas should say of the target: `[keyframes * GRID * GRID, 2 * FINENESS ** 2]`."""
    moments = [[cell_labels(case.target.shapes(frame), GRID, FINENESS) for frame in frames] for frames in MOMENTS]
    return np.concatenate([np.concatenate(both, axis=1) for both in moments])


class Labeller(nn.Module):
    """The planner and two linear heads, on its canvas and on what its vision tower gives; training aids, not shipped."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner
        self.head = nn.Linear(PLANNER_WIDTH, 2 * FINENESS**2 * CLASSES)

    def forward(self, read: Read) -> Tensor:
        """Logits `[N, keyframes * GRID * GRID, 2 * FINENESS ** 2, CLASSES]`."""
        canvas = plan(self.planner, read).canvas
        return self.head(canvas.flatten(1, 3)).unflatten(-1, (2 * FINENESS**2, CLASSES))


class Eyes(nn.Module):
    """The vision tower and a linear head on its tokens: what each shows, at both of its frames."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.tower = planner.qwen.visual
        self.head = nn.Linear(PLANNER_WIDTH, 2 * SEEN_FINENESS**2 * CLASSES)

    def forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        """Logits `[tokens, 2 * SEEN_FINENESS ** 2, CLASSES]`."""
        tokens = self.tower(pixels, grid_thw=grids).pooler_output
        return self.head(tokens).unflatten(-1, (2 * SEEN_FINENESS**2, CLASSES))


def seen_labels(case: Case) -> NDArray[np.uint8]:
    """What the vision tokens of a case show, `[tokens, 2 * SEEN_FINENESS ** 2]`."""
    cells = data.SIDE // (PATCH * MERGE)
    if case.source is not None:
        pairs = [(case.source.shapes(first), case.source.shapes(second)) for first, second in ((0, 2), (4, 6))]
    else:
        shapes = case.target.shapes(0) if case.reference is None else [case.reference]
        pairs = [(shapes, shapes)]
    return np.concatenate(
        [np.concatenate([cell_labels(shapes, cells, SEEN_FINENESS) for shapes in pair], axis=1) for pair in pairs]
    )


def weights() -> Tensor:
    """Of the classes: most of a picture is ground."""
    weight = torch.ones(CLASSES)
    weight[0] = 0.3
    return weight


def train_eyes(planner: Planner, reader: Reader, work: Path, seed: int, steps: int, batch: int = 64) -> None:
    """Trains the vision tower in place to say what stands where in a picture or a clip."""
    tasks = TASKS[1:]
    torch.manual_seed(seed)
    eyes = Eyes(planner)

    def loss_of(cases: list[Case], module: nn.Module) -> tuple[Tensor, Tensor]:
        read = reader(cases)
        grids = torch.tensor(read.grids)
        logits = module(torch.cat([values for values in read.pixels if values is not None]), grids)
        target = torch.from_numpy(np.concatenate([seen_labels(case) for case in cases])).long()
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), weights())
        return loss, (logits.argmax(-1) == target).float().mean()

    def loss_at(step: int) -> Tensor:
        cases = sample_cases(batch, False, random.Random(f"eyes {seed} {step}"), tasks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(cases, eyes)[0]

    def probe(module: nn.Module) -> str:
        loss, right = loss_of(sample_cases(192, True, random.Random(seed), tasks), module)
        return f"held-out parts {right:.4f}, loss {loss:.4f}"

    fit(Fit("eyes", steps, lr=2e-3, warmup=50, probe_every=200), eyes, loss_at, work, seed, probe)


def train_planner(planner: Planner, reader: Reader, work: Path, seed: int, steps: int, batch: int = 48) -> None:
    """Trains vision tower, language model and canvas tokens in place; every step has new cases."""
    torch.manual_seed(seed + 1)
    labeller = Labeller(planner)
    unseen = {task: sample_cases(48, True, random.Random(seed + 1), (task,)) for task in TASKS}

    def targets(cases: list[Case]) -> Tensor:
        return torch.from_numpy(np.stack([film_labels(case) for case in cases])).long()

    def loss_at(step: int) -> Tensor:
        cases = sample_cases(batch, False, random.Random(f"planner {seed} {step}"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = labeller(reader(cases))
        return F.cross_entropy(logits.float().flatten(0, 2), targets(cases).flatten(), weights())

    def probe(module: nn.Module) -> str:
        shares = []
        for task, cases in unseen.items():
            wanted = targets(cases)
            right = module(reader(cases)).argmax(-1) == wanted
            shapes = right[wanted > 0].float().mean()
            shares.append(f"{task} {right.float().mean():.4f} (shapes {shapes:.3f})")
        return "held-out parts: " + ", ".join(shares)

    fit(Fit("planner", steps, lr=2e-3, probe_every=100), labeller, loss_at, work, seed + 1, probe)
