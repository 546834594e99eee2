"""Linear layers and 1 x 1 convolutions in FP8 and INT4, as targets run them."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.quantize.fp8.int4 import Int4Linear
from mc_kernels import int4_weights
from mc_kernels.fp8_linear import MULTIPLE, fp8_linear, fp8_linear_scaled, fp8_product, quantize_rows
from mc_kernels.fp8_round import fp8_round, fp8_weights, power_of_two_scale


class Activations(StrEnum):
    """What has a scale of its own beside the weights' columns.

    `rows`: every row of the input, found while it runs (FP8, `torch._scaled_mm`). `tensor`: the whole input, known when the
    engine is built (FP8, TensorRT's pairs of quantize and dequantize). `blocks`: parts of the weights' columns, and inputs
    are not rounded (INT4, TensorRT).
    """

    ROWS = "rows"
    TENSOR = "tensor"
    BLOCKS = "blocks"

    @property
    def numbers(self) -> str:
        """The numbers that weights are made of."""
        return "INT4" if self is Activations.BLOCKS else "FP8"


FP8_ACTIVATIONS = (Activations.ROWS, Activations.TENSOR)
"""The kinds of FP8."""


class Fp8Linear(nn.Module):
    """``x W^T + b`` with a scale for each row of x and each row of W; see `mc_kernels.fp8_linear`.

    Codes and scales are no saved buffers: those are what a precision below float32 is applied to.

    Args:
        weight: `[out, in]` in float32, both multiples of 16.
        bias: `[out]` or None.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        codes, scale = quantize_rows(weight.detach())
        self._hold(codes, scale, bias)

    def _hold(self, codes: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = bias

    @classmethod
    def merged(cls, layers: list[Fp8Linear]) -> Fp8Linear:
        """Layers of one input as one: the same codes and scales side by side. With biases all, or none."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        made._hold(torch.cat([layer.codes for layer in layers]), torch.cat([layer.scale for layer in layers]), bias)
        return made

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.codes.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.codes.shape[0])

    @property
    def weight(self) -> Tensor:
        """What the codes stand for, in the bias's type where there is one: models ask their layers for it."""
        return (self.codes.float() * self.scale[:, None]).to(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, input: Tensor) -> Tensor:  # models name it: it is `torch.nn.Linear`'s
        """`[..., in]` to `[..., out]`."""
        # `torch.compile` sees plain operators, which it fuses; an export has one of ours, which its target takes apart or not.
        plain = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        result: Tensor = (fp8_linear_scaled if plain else fp8_linear)(input, self.codes, self.scale, self.bias)
        return result

    def of_codes(self, codes: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for an input in codes `[..., in]`, with the scales of its rows `[...]`."""
        result: Tensor = fp8_product(codes, row_scale, self.codes, self.scale, self.bias, dtype)
        return result


class Fp8RoundedLinear(nn.Module):
    """``x W^T + b`` with x and W rounded to e4m3, one scale for x and one for each row of W; see `mc_kernels.fp8_round`.

    The scales are saved buffers, so that they have the type that a precision below float32 gives them: powers of two are the
    same in all of them.

    Args:
        weight: `[out, in]` in float32.
        bias: `[out]` or None.
        largest: of the input's magnitudes, as calibration saw them; larger ones are clamped to what the scale reaches.
    """

    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, largest: float) -> None:
        super().__init__()
        weight = weight.detach()
        scale = power_of_two_scale(weight.abs().amax(dim=-1))
        self.register_buffer("codes", (weight / scale[:, None]).to(torch.float8_e4m3fn), persistent=False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", power_of_two_scale(torch.tensor(largest)))
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """What the codes stand for."""
        result: Tensor = fp8_weights(self.codes, self.weight_scale)
        return result

    def forward(self, input: Tensor) -> Tensor:  # models name it: it is `torch.nn.Linear`'s
        """`[..., in]` to `[..., out]`."""
        return F.linear(fp8_round(input, self.input_scale), self.weight, self.bias)


class Pointwise(nn.Module):
    """A 1 x 1 convolution as a linear layer on every cell: `[N, in, H, W]` to `[N, out, H, W]`."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        """`[N, in, H, W]` to `[N, out, H, W]`."""
        cells: Tensor = self.linear(input.movedim(1, -1))
        return cells.movedim(-1, 1)


def takes(layer: nn.Module, activations: Activations = Activations.ROWS) -> bool:
    """Whether a layer is a matrix product of a form and of widths that FP8 or INT4 is for.

    One that a hook hangs on is not: what takes its place has none. Behind FLUX's patch embedding the canvas enters so.
    """
    if layer._forward_hooks:
        return False
    if isinstance(layer, nn.Linear):
        given, made = layer.in_features, layer.out_features
    elif isinstance(layer, nn.Conv2d):
        plain = layer.kernel_size == layer.stride == layer.dilation == (1, 1) and layer.groups == 1
        if not plain or layer.padding not in ((0, 0), "valid", "same"):
            return False
        given, made = layer.in_channels, layer.out_channels
    else:
        return False
    if activations is Activations.BLOCKS:
        return int4_weights.block_of(given) is not None and made % int4_weights.MULTIPLE == 0
    return given % MULTIPLE == 0 and made % MULTIPLE == 0


def fp8_layer(layer: nn.Module, activations: Activations, largest: float) -> nn.Module:
    """What stands for a layer (`takes`); `largest` of its input's magnitudes is of use to `Activations.TENSOR`."""
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    linear = _linear(layer.weight.flatten(1), layer.bias, activations, largest)
    return Pointwise(linear) if isinstance(layer, nn.Conv2d) else linear


def _linear(weight: Tensor, bias: nn.Parameter | None, activations: Activations, largest: float) -> nn.Module:
    match activations:
        case Activations.ROWS:
            return Fp8Linear(weight, bias)
        case Activations.TENSOR:
            return Fp8RoundedLinear(weight, bias, largest)
        case Activations.BLOCKS:
            return Int4Linear(weight, bias)
