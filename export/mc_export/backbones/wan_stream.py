"""What passes between Wan's blocks: frames of tokens, those of the references, where there are any, before the target's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mc_export.backbones.stream import HIDDEN, BlockStream, Sizes, folded

_REFERENCES = "hidden_references"


class WanStream(BlockStream):
    """A prepared block returns `[N, frames, cells, D]`."""

    lists = ("blocks",)

    def shapes(self, width: int, cells: int, config: Any) -> dict[str, tuple[int | str, ...]]:
        target: dict[str, tuple[int | str, ...]] = {HIDDEN: ("T", "H", "W", width // cells)}
        return target | ({_REFERENCES: ("R", "H", "W", width // cells)} if _has_references(config) else {})

    def tensors(self, output: Any, sizes: Sizes, config: Any) -> dict[str, Tensor]:
        size = sizes["H"], sizes["W"]
        if not _has_references(config):
            return {HIDDEN: folded(output, sizes["T"], *size)}
        count = sizes["R"]
        return {HIDDEN: folded(output[:, count:], sizes["T"], *size), _REFERENCES: folded(output[:, :count], count, *size)}

    def output(self, tensors: Mapping[str, Tensor], width: int, config: Any) -> Any:
        target = _frames(tensors[HIDDEN], width)
        return torch.cat([_frames(tensors[_REFERENCES], width), target], dim=1) if _REFERENCES in tensors else target


def _frames(cells: Tensor, width: int) -> Tensor:
    return cells.reshape(*cells.shape[:2], -1, width)


def _has_references(config: Any) -> bool:
    return bool(config.in_channels != (config.out_channels or config.in_channels))
