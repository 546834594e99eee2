"""The canvas in the backbone, against the published model and against a loop written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.sana import Sana
from mc_export.backbones.sana_export import use_exportable_self_attention
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from mc_export.model.interpolation import resize_grid
from tests.factories import BACKBONE_DIM, CONTEXT_DIM, PLANNER_DIM, tiny_sana

# (batch, latent height, latent width, context length, canvas grid): odd shapes, a second batch size, canvases of any ratio
SHAPES = [(1, 8, 8, 5, (1, 4, 4)), (2, 7, 9, 13, (1, 7, 9)), (3, 5, 12, 1, (1, 2, 5)), (2, 4, 4, 300, (1, 8, 8))]


def inputs(shape: tuple, seed: int) -> dict[str, Tensor]:
    batch, height, width, length, grid = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": torch.randn(batch, length, CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "canvas": torch.randn(batch, *grid, BACKBONE_DIM, generator=generator),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    model = tiny_sana(seed=11)
    connector = CanvasConnector(PLANNER_DIM, BACKBONE_DIM)
    feeds = inputs(shape, seed=5)
    states = torch.randn(shape[0], *shape[4], PLANNER_DIM)
    with torch.no_grad():
        published = model(
            hidden_states=feeds["sample"],
            timestep=feeds["timestep"],
            encoder_hidden_states=feeds["context"],
            encoder_attention_mask=feeds["context_mask"],
            return_dict=False,
        )[0]
        feeds["canvas"] = connector.draw(states)
        injected = CanvasBackbone(Sana(), model, connector)(**feeds)
    assert torch.equal(feeds["canvas"], torch.zeros_like(feeds["canvas"]))
    assert torch.equal(injected, published)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple) -> None:
    model = tiny_sana(seed=12)
    connector = CanvasConnector(PLANNER_DIM, BACKBONE_DIM).eval()
    randomize_projections(connector, seed=13)
    feeds = inputs(shape, seed=6)
    with torch.no_grad():
        injected = CanvasBackbone(Sana(), model, connector)(**feeds)
        plain = plain_prediction(model, connector, **feeds)
        without = CanvasBackbone(Sana(), tiny_sana(seed=12), None)(**{**feeds, "canvas": None})
    torch.testing.assert_close(injected, plain, atol=2e-5, rtol=1e-4)
    assert (injected - without).abs().max() > 0.05, "the canvas must reach the output"


@pytest.mark.parametrize("shape", SHAPES)
def test_export_form_of_the_backbone_equals_the_published_one(shape: tuple) -> None:
    connector = CanvasConnector(PLANNER_DIM, BACKBONE_DIM).eval()
    randomize_projections(connector, seed=3)
    feeds = inputs(shape, seed=7)
    with torch.no_grad():
        published = CanvasBackbone(Sana(), tiny_sana(seed=4), connector)(**feeds)
        prepared = CanvasBackbone(Sana(), tiny_sana(seed=4), connector)
        context = Sana().context_preparation(prepared.model)
        Sana().prepare_for_export(prepared.model)
        use_exportable_self_attention(connector)
        exported = prepared(**{**feeds, "context": context(feeds["context"])})
    torch.testing.assert_close(exported, published, atol=2e-5, rtol=1e-4)


def test_the_state_dict_keeps_the_published_keys() -> None:
    keys = set(tiny_sana(seed=0).state_dict())
    injected = CanvasBackbone(Sana(), tiny_sana(seed=0), CanvasConnector(PLANNER_DIM, BACKBONE_DIM))
    assert set(injected.model.state_dict()) == keys


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 11, 20), (31, 22, 40), (2, 3, 9), (1, 1, 1)])
def test_resize_equals_trilinear_interpolation(size: tuple[int, int, int]) -> None:
    grid = torch.randn(2, 3, 11, 20, 8, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(grid.permute(0, 4, 1, 2, 3), size=size, mode="trilinear").permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(resize_grid(grid, size), expected, atol=5e-6, rtol=1e-5)


def test_connector_refuses_widths_its_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="48 is no multiple of"):
        CanvasConnector(PLANNER_DIM, 48)


def plain_prediction(
    model: nn.Module,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_mask: Tensor,
    canvas: Tensor,
) -> Tensor:
    """The whole step without hooks: the backbone's parts called one by one, the connector in plain formulas."""
    batch, _, height, width = sample.shape
    hidden = model.patch_embed(sample)
    resized = F.interpolate(canvas.permute(0, 4, 1, 2, 3), size=(1, height, width), mode="trilinear")
    fused = hidden + resized[:, :, 0].flatten(2).transpose(1, 2)
    hidden = hidden + plain_step_block(connector.step_block, fused, timestep, height, width)
    modulation, embedded = model.time_embed(timestep, batch_size=batch, hidden_dtype=hidden.dtype)
    states = model.caption_norm(model.caption_projection(context).view(batch, -1, hidden.shape[-1]))
    bias = ((1 - context_mask.float()) * -10000.0)[:, None]
    for block in model.transformer_blocks:
        hidden = block(hidden, None, states, bias, modulation, height, width)
    hidden = model.proj_out(model.norm_out(hidden, embedded, model.scale_shift_table))
    return hidden.transpose(1, 2).unflatten(2, (height, width))


def plain_step_block(step: nn.Module, fused: Tensor, timestep: Tensor, height: int, width: int) -> Tensor:
    """Algorithm 1's DiT block in formulas: AdaLN-single, ReLU linear attention token by token, Mix-FFN, projection."""
    block, dim = step.block, fused.shape[-1]
    modulation, _ = step.time_embed(timestep, batch_size=len(fused), hidden_dtype=fused.dtype)
    table = block.scale_shift_table[None] + modulation.reshape(len(fused), 6, dim)
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (table[:, i : i + 1] for i in range(6))
    normed = F.layer_norm(fused, (dim,), eps=1e-6) * (1 + scale_a) + shift_a
    query, key, value = (F.linear(normed, layer.weight) for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))
    attended = torch.zeros_like(fused)
    for head in range(dim // 32):
        rows = slice(32 * head, 32 * head + 32)
        q, k, v = query[..., rows].relu(), key[..., rows].relu(), value[..., rows]
        memory = torch.einsum("bnk,bnv->bkv", k, v)
        attended[..., rows] = torch.einsum("bnk,bkv->bnv", q, memory) / (q @ k.sum(1)[..., None] + 1e-15)
    output = block.attn1.to_out[0]
    hidden = fused + gate_a * F.linear(attended, output.weight, output.bias)
    normed = F.layer_norm(hidden, (dim,), eps=1e-6) * (1 + scale_f) + shift_f
    image = normed.transpose(1, 2).unflatten(2, (height, width))
    inverted, depthwise, point = block.ff.conv_inverted, block.ff.conv_depth, block.ff.conv_point
    image = F.silu(F.conv2d(image, inverted.weight, inverted.bias))
    image = F.conv2d(image, depthwise.weight, depthwise.bias, padding=1, groups=depthwise.groups)
    content, gate = image.chunk(2, dim=1)
    image = F.conv2d(content * F.silu(gate), point.weight)
    hidden = hidden + gate_f * image.flatten(2).transpose(1, 2)
    return F.linear(hidden, step.proj_out.weight, step.proj_out.bias)
