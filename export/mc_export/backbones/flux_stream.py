"""What passes between FLUX's blocks: a text stream and a picture's; behind the target's tokens in it, the reference's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mc_export.backbones.stream import HIDDEN, BlockStream, Sizes, folded, unfolded

PATCH = 2  # latent cells along each side of a token; fixed by the pipelines, not in the model's configuration
_TEXT = "hidden_context"
_REFERENCE = "hidden_reference"


class FluxStream(BlockStream):
    """FLUX.1: a block returns (text `[N, L, D]`, picture `[N, tokens, D]`)."""

    lists = ("transformer_blocks", "single_transformer_blocks")

    def shapes(self, width: int, cells: int, config: Any) -> dict[str, tuple[int | str, ...]]:
        return {HIDDEN: ("H", "W", width // cells), _TEXT: ("L", width)}

    def tensors(self, output: Any, sizes: Sizes, config: Any) -> dict[str, Tensor]:
        text, tokens = output
        return {HIDDEN: folded(tokens, sizes["H"], sizes["W"]), _TEXT: text}

    def output(self, tensors: Mapping[str, Tensor], width: int, config: Any) -> Any:
        return tensors[_TEXT], unfolded(tensors[HIDDEN], width)


class KontextStream(FluxStream):
    """FLUX.1-Kontext: the reference's tokens follow the target's."""

    def shapes(self, width: int, cells: int, config: Any) -> dict[str, tuple[int | str, ...]]:
        return {**super().shapes(width, cells, config), _REFERENCE: ("RH", "RW", width // cells)}

    def tensors(self, output: Any, sizes: Sizes, config: Any) -> dict[str, Tensor]:
        text, tokens = output
        count = (sizes["H"] // PATCH) * (sizes["W"] // PATCH)
        reference = folded(tokens[:, count:], sizes["RH"], sizes["RW"])
        return {**super().tensors((text, tokens[:, :count]), sizes, config), _REFERENCE: reference}

    def output(self, tensors: Mapping[str, Tensor], width: int, config: Any) -> Any:
        text, tokens = super().output(tensors, width, config)
        return text, torch.cat([tokens, unfolded(tensors[_REFERENCE], width)], dim=1)
