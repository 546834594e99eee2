"""The references in float64 against the published code they restate."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaModulatedNorm
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn

from mc_export.model.interpolation import resize_grid
from mc_kernels.canvas_inject import canvas_inject_fp8_reference, canvas_inject_reference
from mc_kernels.gated_residual_norm import gated_residual_norm_reference
from mc_kernels.glumb_depthwise import glumb_depthwise_reference, taps_from_conv
from mc_kernels.guided_step import guided_step_reference
from mc_kernels.linear_attention import linear_attention_reference
from mc_kernels.qk_norm_rope import qk_norm_rope_reference, rotary_tables


def draw(*shape: int, seed: int = 20) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("size", "grid"), [((1, 5, 123), (1, 3, 31)), ((7, 6, 9), (3, 2, 4)), ((2, 3, 4), (3, 7, 5))])
def test_canvas_inject(size: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
    x, canvas, modulation = draw(2, *size, 24), draw(2, *grid, 24, seed=21), draw(2, size[0], 2, 24, seed=22)
    h, u = canvas_inject_reference(x, canvas, modulation[:, :, 0], modulation[:, :, 1])
    # resize_grid computes its weights in float32, whatever the canvas.
    torch.testing.assert_close(h, x + resize_grid(canvas, size), rtol=0, atol=2e-5)
    norm = SanaModulatedNorm(24).double()
    for frame in range(size[0]):
        table = torch.zeros(2, 24, dtype=torch.float64)
        for b in range(2):
            # SanaModulatedNorm has one embedding for shift and scale and tells them apart in its table.
            rows = norm(h[b : b + 1, frame].flatten(1, 2), torch.zeros(1, 24).double(), table + modulation[b, frame])
            torch.testing.assert_close(u[b : b + 1, frame].flatten(1, 2), rows)


def test_canvas_inject_codes_decode_to_u() -> None:
    x, canvas, modulation = draw(1, 2, 3, 4, 32), draw(1, 1, 3, 4, 32, seed=21), draw(1, 2, 2, 32, seed=22)
    h, u = canvas_inject_reference(x, canvas, modulation[:, :, 0], modulation[:, :, 1])
    same_h, codes, row_scale = canvas_inject_fp8_reference(x, canvas, modulation[:, :, 0], modulation[:, :, 1])
    assert torch.equal(h, same_h)
    assert codes.float().abs().amax(-1).eq(448).all()
    torch.testing.assert_close(codes.double() * row_scale[..., None].double(), u, rtol=2**-4, atol=2e-3)


def test_linear_attention() -> None:
    torch.manual_seed(23)
    attention = Attention(64, heads=2, dim_head=32, processor=SanaLinearAttnProcessor2_0()).requires_grad_(False)
    attention.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    tokens = draw(3, 63, 64).float()
    q, k, v = (layer(tokens).double().unflatten(-1, (2, 32)) for layer in (attention.to_q, attention.to_k, attention.to_v))
    # The published processor casts to float32 inside.
    torch.testing.assert_close(linear_attention_reference(q, k, v).flatten(2), attention(tokens).double(), rtol=2e-5, atol=2e-6)


def test_gated_residual_norm() -> None:
    h, y, modulation = draw(2, 5, 40), draw(2, 5, 40, seed=21), draw(2, 1, 3, 40, seed=22)
    gate, shift, scale = modulation.unbind(2)
    summed, u = gated_residual_norm_reference(h, y, gate, shift, scale)
    torch.testing.assert_close(summed, h + gate * y)
    torch.testing.assert_close(u, nn.LayerNorm(40, eps=1e-6, elementwise_affine=False)(h + gate * y) * (1 + scale) + shift)
    weight, bias = draw(40, seed=23), draw(40, seed=24)
    affine = nn.LayerNorm(40, eps=1e-6).double()
    affine.load_state_dict({"weight": weight, "bias": bias})
    _, u = gated_residual_norm_reference(h, y, None, bias.expand(2, 1, 40), (weight - 1).expand(2, 1, 40))
    torch.testing.assert_close(u, affine(h + y))


def test_glumb_depthwise() -> None:
    torch.manual_seed(24)
    ff = GLUMBConv(8, 8, expand_ratio=2.5, residual_connection=False).double().requires_grad_(False)
    image = draw(2, 8, 5, 7)
    p = ff.conv_inverted(image).permute(0, 2, 3, 1)
    taps = taps_from_conv(ff.conv_depth.weight)
    assert taps.dtype == torch.float32
    ff.conv_depth.weight.copy_(ff.conv_depth.weight.float())  # taps are float32: compare like with like
    mixed = glumb_depthwise_reference(p, taps, ff.conv_depth.bias)
    torch.testing.assert_close(ff.conv_point(mixed.permute(0, 3, 1, 2)), ff(image))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_guided_step(order: int) -> None:
    """A loop over samples, steps and branches, one scalar at a time."""
    batch, branches, past = 2, 3, 2 * (order - 1)
    predictions, guidance, coefficients = (
        draw(batch, branches, 4, 5),
        draw(batch, branches, seed=21),
        draw(batch, 1 + 2 * order, seed=22),
    )
    sample, history = draw(batch, 4, 5, seed=23), draw(batch, past, 4, 5, seed=24)
    stepped, remembered = guided_step_reference(predictions, guidance, coefficients, sample, history if order > 1 else None)
    for b in range(batch):
        guided = sum(guidance[b, g] * predictions[b, g] for g in range(branches))
        samples = [sample[b], *history[b, : order - 1]]
        predicted = [guided, *history[b, order - 1 :]]
        terms = zip(coefficients[b, 1:], samples + predicted, strict=True)
        torch.testing.assert_close(stepped[b], sum(weight * term for weight, term in terms))
        for slot, term in enumerate(samples[:-1] + predicted[:-1]):
            torch.testing.assert_close(remembered[b, slot], term)


def grid_positions(size: tuple[int, int, int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(extent) for extent in size)).float()


def test_flux_norm_and_rotation() -> None:
    positions = grid_positions((1, 3, 4))
    axes = (4, 6, 6)
    cos, sin = rotary_tables(positions, axes)
    published = FluxPosEmbed(theta=10000, axes_dim=list(axes))(positions)
    torch.testing.assert_close((cos, sin), tuple(table[:, ::2].float() for table in published))
    q, k, weights = draw(2, 12, 3, 16), draw(2, 12, 3, 16, seed=21), draw(2, 16, seed=22)
    rotated = qk_norm_rope_reference(q, k, *weights, cos, sin)
    norm = nn.RMSNorm(16, eps=1e-6).double().requires_grad_(False)
    for states, weight, ours in zip((q, k), weights, rotated, strict=True):
        norm.weight.copy_(weight)
        exact = apply_rotary_emb(norm(states), published, sequence_dim=1)
        # apply_rotary_emb casts to float32 inside.
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_wan_norm_and_rotation() -> None:
    size, width = (2, 3, 4), 24
    cos, sin = rotary_tables(grid_positions(size), (8, 8, 8))
    published = WanRotaryPosEmbed(width, patch_size=(1, 1, 1), max_seq_len=32)(torch.zeros(1, 1, *size))
    torch.testing.assert_close((cos, sin), tuple(table[0, :, 0, ::2].float() for table in published))
    q, weight = draw(1, 24, 2, width), draw(2 * width, seed=22)
    norm = nn.RMSNorm(2 * width, eps=1e-6).double().requires_grad_(False)
    norm.weight.copy_(weight)
    even, odd = norm(q.flatten(2)).unflatten(2, (2, -1, 2)).unbind(-1)
    exact = torch.empty_like(q)
    exact[..., 0::2] = even * cos[:, None] - odd * sin[:, None]
    exact[..., 1::2] = even * sin[:, None] + odd * cos[:, None]
    torch.testing.assert_close(qk_norm_rope_reference(q, q, weight, weight, cos, sin)[1], exact)


def test_rotary_tables_refuse_what_they_cannot_place() -> None:
    with pytest.raises(ValueError, match=r"pass \[N, 3\]"):
        rotary_tables(torch.zeros(5, 2), (4, 6, 6))
    with pytest.raises(ValueError, match="must be even"):
        rotary_tables(torch.zeros(5, 3), (5, 6, 5))
