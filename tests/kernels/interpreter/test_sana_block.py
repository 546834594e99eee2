"""The kernels put together against the published block, `diffusers`' own `SanaTransformerBlock`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from mc_kernels.canvas_injection_attention import (
    canvas_injection_attention,
    canvas_injection_attention_reference,
    canvas_injection_attention_triton,
    merged_projection,
)
from mc_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_triton
from mc_kernels.glumb_depthwise import glumb_depthwise, glumb_depthwise_triton, taps_from_conv
from tests.kernels.numerics import assert_close, draw

WIDTH, BATCH, LATENTS, CANVAS = 64, 2, (2, 3, 5), (2, 2, 2)
KERNELS = (canvas_injection_attention_triton, gated_residual_norm_triton, glumb_depthwise_triton)
OPERATORS = (canvas_injection_attention, gated_residual_norm, glumb_depthwise)


def published_block() -> SanaTransformerBlock:
    """The connector's: no cross-attention, whose parts the published forward nevertheless looks for."""
    torch.manual_seed(13)
    block = SanaTransformerBlock(
        dim=WIDTH, num_attention_heads=2, attention_head_dim=32, cross_attention_dim=None, attention_bias=False
    )  # fmt: skip
    block.attn2, block.norm2 = None, nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
    return block.double().requires_grad_(False).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, canvas, and the six modulations of every frame."""
    generator = torch.Generator().manual_seed(14)
    x, canvas = draw(generator, BATCH, *LATENTS, WIDTH), draw(generator, BATCH, *CANVAS, WIDTH)
    return x, canvas, draw(generator, BATCH, LATENTS[0], 6, WIDTH)


def fused_block(block: SanaTransformerBlock, steps: tuple, x: Tensor, canvas: Tensor, modulation: Tensor) -> Tensor:
    """The published forward, its elementwise parts and attention replaced; batch and frames fold together."""
    inject_attend, residual_norm, depthwise = steps
    attention, ff = block.attn1, block.ff
    table = (block.scale_shift_table + modulation).float()
    weights = merged_projection(attention.to_q.weight, attention.to_k.weight, attention.to_v.weight).float()
    h, attended = inject_attend(x, canvas, table[:, :, 0], table[:, :, 1], weights)
    folded = table.flatten(0, 1)
    gate, shift, scale = folded[:, 2:3], folded[:, 3:4], folded[:, 4:5]
    output = F.linear(attended, attention.to_out[0].weight.float(), attention.to_out[0].bias.float())
    tokens = (BATCH * LATENTS[0], LATENTS[1] * LATENTS[2], WIDTH)
    h, u = residual_norm(h.reshape(tokens), output.reshape(tokens), gate, shift, scale)
    expanded = F.linear(u, ff.conv_inverted.weight.float()[:, :, 0, 0], ff.conv_inverted.bias.float())
    image = expanded.unflatten(1, LATENTS[1:])
    mixed = depthwise(image, taps_from_conv(ff.conv_depth.weight), ff.conv_depth.bias.float())
    return h + folded[:, 5:6] * F.linear(mixed.flatten(1, 2), ff.conv_point.weight.float()[:, :, 0, 0])


@pytest.mark.parametrize("steps", [KERNELS, OPERATORS], ids=["kernels", "operators"])
def test_composition_equals_the_published_block(steps: tuple) -> None:
    block, (x, canvas, modulation) = published_block(), inputs()
    exact = x.double() + F.interpolate(canvas.double().permute(0, 4, 1, 2, 3), LATENTS, mode="trilinear").permute(0, 2, 3, 4, 1)
    published = block(
        exact.reshape(-1, LATENTS[1] * LATENTS[2], WIDTH), timestep=modulation.double().flatten(0, 1), height=3, width=5
    )  # fmt: skip
    assert_close(fused_block(block, steps, x, canvas, modulation), published, "block")


# Between the kernels u and the projection are rounded to the storage type: eight bits of mantissa in bfloat16, eleven in
# float16, and a sum over the tokens averages them; outputs are a mean of values near 1.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_fused_operator_equals_its_reference(dtype: torch.dtype, tolerance: float) -> None:
    x, canvas, modulation = (tensor.to(dtype) for tensor in inputs())
    weights = (draw(torch.Generator().manual_seed(15), 3 * WIDTH, WIDTH) / WIDTH**0.5).to(dtype)
    bias = draw(torch.Generator().manual_seed(16), 3 * WIDTH, dtype=dtype)
    arguments = (x, canvas, modulation[:, :, 0], modulation[:, :, 1], weights, bias)
    exact = canvas_injection_attention_reference(*(tensor.double() for tensor in arguments))
    h, attended = canvas_injection_attention_triton(*arguments)
    assert_close(h, exact[0], "h")
    assert_close(attended, exact[1], "o", absolute=tolerance)


def test_weights_of_another_width_are_refused() -> None:
    x, canvas, modulation = inputs()
    with pytest.raises(ValueError, match=r"pass a multiple of 32 and the \[192, 64\] of merged_projection"):
        canvas_injection_attention_triton(x, canvas, modulation[:, :, 0], modulation[:, :, 1], torch.zeros(64, 64))
