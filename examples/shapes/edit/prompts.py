"""Instructions and pictures as the planner takes them, thousands at a time: all pictures are of one size here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer

from examples.shapes.data import SIDE
from examples.shapes.edit.models import CONFIG, GRID, VISION_MERGE, VISION_PATCH, build_image_processor
from mc_export.model.planner import Planner, PlannerStates
from mc_export.program.vision import VisionProgram
from mc_export.reference.pictures import IMAGE, Pictures, encode_with_pictures

TOKENS = GRID**2
"""Of one picture."""


class Instructions(NamedTuple):
    """Every instruction once, with the place of one picture in it; all are equally long."""

    ids: Tensor
    positions: Tensor
    canvas_positions: Tensor
    vision_index: Tensor

    def rows(self, chosen: Tensor) -> dict[str, Tensor]:
        """Arguments of :class:`Planner` for some of them, each with a picture of its own."""
        pictures = TOKENS * torch.arange(len(chosen))[:, None]
        index = self.vision_index[chosen]
        return {
            "input_ids": self.ids[chosen],
            "attention_mask": torch.ones_like(self.ids[chosen]),
            "position_ids": self.positions[:, chosen],
            "canvas_position_ids": self.canvas_positions[:, chosen],
            "vision_index": torch.where(index >= 0, index + pictures, index),
        }


@torch.no_grad()
def read_instructions(planner: Planner, tokenizer: Qwen2Tokenizer, texts: Sequence[str]) -> Instructions:
    """`texts` in chat form behind one picture."""
    blank = build_image_processor()(Image.new("RGB", (SIDE, SIDE)), return_tensors="pt")
    picture = Pictures((IMAGE,), {IMAGE: blank.pixel_values}, {IMAGE: blank.image_grid_thw}, ())
    encoded = encode_with_pictures(planner, tokenizer, CONFIG, list(texts), CONFIG.canvas.grid, picture)
    if not bool(encoded["attention_mask"].all()):
        raise ValueError("instructions of different lengths")
    return Instructions(*(encoded[name] for name in ("input_ids", "position_ids", "canvas_position_ids", "vision_index")))


class Eyes:
    """Pictures `[B, 3, SIDE, SIDE]` u8 to the patches of Qwen2.5-VL's processor, and through the tower all at once."""

    def __init__(self, planner: Planner) -> None:
        processor = build_image_processor()
        self._tower = VisionProgram(planner.qwen.visual)
        self._mean, self._std = (
            torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std)
        )
        patches = torch.arange(TOKENS * VISION_MERGE**2)
        within = patches.unflatten(0, (GRID, GRID, VISION_MERGE, VISION_MERGE))
        rows = torch.arange(GRID * VISION_MERGE).reshape(GRID, 1, VISION_MERGE, 1).expand_as(within)
        columns = torch.arange(GRID * VISION_MERGE).reshape(1, GRID, 1, VISION_MERGE).expand_as(within)
        self._positions = torch.stack([rows, columns], dim=-1).reshape(TOKENS, VISION_MERGE**2, 2)
        self._patches = patches

    def patches(self, pictures: Tensor) -> Tensor:
        """`[B * TOKENS, patches a token, values]`."""
        signal = (pictures / 255 - self._mean) / self._std
        side = (GRID, VISION_MERGE, VISION_PATCH)
        cut = signal.unflatten(3, side).unflatten(2, side)  # B, C, then (cell, patch, pixel) of rows and of columns
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
        return cut.flatten(5).flatten(3, 4).flatten(0, 2)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Embeddings `[B * TOKENS, D]`."""
        batch = len(pictures)
        groups = torch.arange(batch)[:, None] * len(self._patches) + self._patches
        places = groups.reshape(batch * TOKENS, VISION_MERGE**2)
        positions = self._positions.repeat(batch, 1, 1)
        return self._tower(self.patches(pictures), positions, groups, places, groups, places)


@torch.no_grad()
def plan_all(planner: Planner, instructions: Instructions, rows: Tensor, pictures: Tensor, batch: int = 256) -> PlannerStates:
    """The planner's states for all `pictures`, each with the instruction in its row; in bfloat16, for they are many."""
    eyes, contexts, canvases = Eyes(planner), [], []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(rows), batch):
            chosen = slice(start, start + batch)
            states = planner(**instructions.rows(rows[chosen]), vision=eyes(pictures[chosen]))
            contexts.append(states.context.bfloat16())
            canvases.append(states.canvas.bfloat16())
    return PlannerStates(torch.cat(contexts), torch.cat(canvases))


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """u8 `[B, 3, SIDE, SIDE]`."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
