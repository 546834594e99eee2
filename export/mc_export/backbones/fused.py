"""Linear layers of one input as a single product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class FusedLinear(nn.Linear):
    """Layers that read the same input, side by side along their output.

    Args:
        layers: by the names that checkpoints have for them, in the order of the output; with biases all, or none.

    Attributes:
        sources: their names and widths, in the order of the output.
    """

    sources: Mapping[str, int]

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        fused = list(layers.values())
        first = fused[0]
        biases = [layer.bias for layer in fused if layer.bias is not None]
        super().__init__(
            first.in_features, sum(layer.out_features for layer in fused), bias=bool(biases), dtype=first.weight.dtype
        )
        with torch.no_grad():
            self.weight.copy_(torch.cat([layer.weight for layer in fused]))
            if biases:
                self.bias.copy_(torch.cat(biases))
        self.sources = {name: layer.out_features for name, layer in layers.items()}
