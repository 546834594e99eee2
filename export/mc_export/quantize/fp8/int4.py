"""A linear layer with weights of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mc_kernels.int4_weights import block_of, int4_weights, quantize_blocks


class Int4Linear(nn.Module):
    """``x W^T + b`` with W rounded to 4 bits, a scale for each block of its columns; see `mc_kernels.int4_weights`.

    Codes are no saved buffer: those are what a precision below float32 is applied to. Scales are, so that the product has its
    type.

    Args:
        weight: `[out, in]` in float32, with an input width that has blocks.
        bias: `[out]` or None.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        block = block_of(weight.shape[1])
        assert block is not None
        self.block = block
        codes, scale = quantize_blocks(weight, block)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, `[out, in]`: models ask their layers for its type."""
        result: Tensor = int4_weights(self.codes, self.scale, self.block)
        return result.T

    def forward(self, input: Tensor) -> Tensor:  # models name it: it is `torch.nn.Linear`'s
        """`[..., in]` to `[..., out]`."""
        product: Tensor = torch.matmul(input, int4_weights(self.codes, self.scale, self.block))
        return product if self.bias is None else product + self.bias
