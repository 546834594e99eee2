"""Cases as the planner reads them: by `mc_runtime`'s own prompting, so that training and production give the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from examples.shapes.video.cases import Case
from examples.shapes.video.models import GRID, KEYFRAMES
from examples.shapes.video.world import FPS
from mc_export.build.contents import write_prompting
from mc_export.checkpoint.load import load_checkpoint
from mc_export.model.planner import Planner, PlannerStates
from mc_runtime.media.clip import Clip
from mc_runtime.prompting.pixels import patches
from mc_runtime.prompting.positions import Grid, canvas_positions
from mc_runtime.prompting.tokenizer import Prompter
from mc_runtime.prompting.vision import look_at


class Read(NamedTuple):
    """Cases as tensors, one row each; what they are shown stands in `pixels`, patch after patch, in the order of the rows.

    Attributes:
        ids, mask: `[N, L]`.
        positions: `[N, 3, L]`.
        canvas_positions: `[N, 3, t, h, w]`.
        index: `[N, L]`, at a vision token its number within its own case, -1 at text.
        pixels: patches of each case, `[n, values]`; none where it is shown nothing.
        grids: of each case, in patches `(t, h, w)`, or None.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    canvas_positions: Tensor
    index: Tensor
    pixels: tuple[Tensor | None, ...]
    grids: tuple[tuple[int, int, int] | None, ...]

    def rows(self, chosen: Sequence[int]) -> Read:
        """Some of the cases, cut to the longest of them."""
        length = int(self.mask[chosen].sum(dim=1).max())
        return Read(
            self.ids[chosen, :length],
            self.mask[chosen, :length],
            self.positions[chosen, :, :length],
            self.canvas_positions[chosen],
            self.index[chosen, :length],
            tuple(self.pixels[row] for row in chosen),
            tuple(self.grids[row] for row in chosen),
        )


class Reader:
    """Reads cases with the tokenizer and the image processor of a checkpoint.

    Args:
        checkpoint: its folder; weights do not matter.
        work: where what a bundle would hold of them is written.
    """

    def __init__(self, checkpoint: Path, work: Path) -> None:
        folder = work / "prompting"
        folder.mkdir(parents=True, exist_ok=True)
        spec = write_prompting(load_checkpoint(checkpoint), folder).planner
        assert spec is not None
        assert spec.vision is not None
        self._vision = spec.vision
        self._prompter = Prompter(spec, folder)

    def __call__(self, cases: Sequence[Case]) -> Read:
        """All cases, padded to the longest."""
        encoded, pixels, grids = [], [], []
        for case in cases:
            clip = case.clip
            media = [case.picture] if case.picture is not None else [Clip(clip, FPS)] if clip is not None else []
            seen = look_at(media, self._vision)
            encoded.append(self._prompter.encode([case.prompt], seen=seen))
            values = [patches(one.frames, self._vision) for one in seen]
            pixels.append(torch.from_numpy(np.concatenate(values)).flatten(0, 1) if values else None)
            merge = self._vision.merge
            sizes = [(one.grid.t, one.grid.h * merge, one.grid.w * merge) for one in seen]
            grids.append(sizes[0] if sizes else None)
        length = max(one.input_ids.shape[1] for one in encoded)

        def padded(name: str, value: int = 0) -> Tensor:
            rows = [torch.from_numpy(getattr(one, name)) for one in encoded]
            return torch.stack([pad(row, (0, length - row.shape[-1]), value=value) for row in rows])

        starts = np.concatenate([one.starts for one in encoded])
        canvas = torch.from_numpy(canvas_positions(starts, Grid(KEYFRAMES, GRID, GRID))).transpose(0, 1)
        ids = padded("input_ids", self._prompter.spec.pad_id)[:, 0]
        positions = padded("position_ids")[:, :, 0]
        index = padded("vision_index", -1)[:, 0]
        return Read(ids, padded("attention_mask")[:, 0], positions, canvas, index, tuple(pixels), tuple(grids))


def plan(planner: Planner, read: Read) -> PlannerStates:
    """The planner's states of all cases in one batch."""
    pixels = [values for values in read.pixels if values is not None]
    vision, index = None, None
    if pixels:
        grids = torch.tensor([grid for grid in read.grids if grid is not None])
        vision = planner.see(torch.cat(pixels), grids)
        counts = (read.index >= 0).sum(dim=1)
        before = counts.cumsum(0) - counts
        index = torch.where(read.index >= 0, read.index + before[:, None], -1)
    states: PlannerStates = planner(
        read.ids, read.mask, read.positions.transpose(0, 1), read.canvas_positions.transpose(0, 1), vision, index
    )
    return states
