"""FLUX.1 and FLUX.1-Kontext: the canvas in them, a MetaCanvas checkpoint, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline
from torch import Tensor

from mc_export.backbones.flux import Flux, FluxKontext
from mc_export.checkpoint import load_checkpoint
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from mc_runtime.errors import CheckpointError
from tests.export.test_canvas_injection import plain_step_block
from tests.factories import PLANNER_DIM
from tests.tiny_flux import (
    FLUX_CHANNELS,
    FLUX_CONTEXT_DIM,
    FLUX_DIM,
    FLUX_POOLED_DIM,
    flux_scheduler,
    pack,
    tiny_flux,
    tiny_metacanvas_flux,
    tiny_stock_flux,
)

# (batch, latent height, latent width, context length, canvas grid, reference height, reference width)
SHAPES = [(1, 10, 6, 4, (1, 2, 2), 4, 14), (3, 6, 8, 9, (1, 5, 3), 2, 2)]


def inputs(shape: tuple, seed: int) -> dict[str, Tensor]:
    batch, height, width, length, grid, *reference = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length)
    mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, FLUX_CHANNELS, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": torch.randn(batch, length, FLUX_CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "canvas": torch.randn(batch, *grid, FLUX_DIM, generator=generator),
        "pooled": torch.randn(batch, FLUX_POOLED_DIM, generator=generator),
        "guidance_scale": torch.linspace(2.3, 4.7, batch),
        "reference": torch.randn(batch, FLUX_CHANNELS, *reference, generator=generator),
        "has_reference": (torch.arange(batch) % 2 == 0).float(),
    }


def ids(height: int, width: int, picture: int) -> Tensor:
    """diffusers' own."""
    found = FluxKontextPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    found[:, 0] = picture
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    """As published: no attention mask at all, the reference behind the target, the target's predictions kept."""
    model = tiny_flux(seed=11)
    connector = CanvasConnector(PLANNER_DIM, FLUX_DIM)
    feeds = inputs(shape, seed=5)
    feeds |= {"context_mask": torch.ones_like(feeds["context_mask"]), "has_reference": torch.ones(shape[0])}
    sample, reference = feeds["sample"], feeds["reference"]
    with torch.no_grad():
        published = model(
            hidden_states=torch.cat([pack(sample), pack(reference)], dim=1),
            timestep=feeds["timestep"] / 1000,
            guidance=feeds["guidance_scale"],
            pooled_projections=feeds["pooled"],
            encoder_hidden_states=feeds["context"],
            txt_ids=torch.zeros(feeds["context"].shape[1], 3),
            img_ids=torch.cat([ids(*sample.shape[2:], 0), ids(*reference.shape[2:], 1)]),
            return_dict=False,
        )[0]
        injected = CanvasBackbone(FluxKontext(), model, connector)(**feeds)
    height, width = sample.shape[2:]
    expected = FluxKontextPipeline._unpack_latents(published[:, : height * width // 4], 2 * height, 2 * width, 2)
    assert torch.equal(injected, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple) -> None:
    model = tiny_flux(seed=12)
    connector = CanvasConnector(PLANNER_DIM, FLUX_DIM).eval()
    randomize_projections(connector, seed=13)
    feeds = inputs(shape, seed=6)
    with torch.no_grad():
        injected = CanvasBackbone(FluxKontext(), model, connector)(**feeds)
        plain = plain_prediction(model, connector, **feeds)
        without = CanvasBackbone(FluxKontext(), tiny_flux(seed=12), None)(**{**feeds, "canvas": None})
    torch.testing.assert_close(injected, plain, atol=2e-5, rtol=1e-4)
    assert (injected - without).abs().max() > 0.05, "the canvas must reach the output"


def plain_prediction(
    model: Any,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_mask: Tensor,
    canvas: Tensor,
    pooled: Tensor,
    guidance_scale: Tensor,
    reference: Tensor,
    has_reference: Tensor,
) -> Tensor:
    """The model's parts called one by one, a sample at a time, without what a mask would hide."""
    results = []
    for row in range(len(sample)):
        one = slice(row, row + 1)
        height, width = (extent // 2 for extent in sample.shape[2:])
        target = model.x_embedder(pack(sample[one]))
        resized = F.interpolate(canvas[one].permute(0, 4, 1, 2, 3), size=(1, height, width), mode="trilinear")
        fused = target + resized[:, :, 0].flatten(2).transpose(1, 2)
        hidden = [target + plain_step_block(connector.step_block, fused, timestep[one], height, width)]
        text = model.context_embedder(context[one, : int(context_mask[row].sum())])
        positions = [torch.zeros(text.shape[1], 3), ids(*sample.shape[2:], 0)]
        if has_reference[row]:
            hidden.append(model.x_embedder(pack(reference[one])))
            positions.append(ids(*reference.shape[2:], 1))
        states = torch.cat(hidden, dim=1)
        rotary = model.pos_embed(torch.cat(positions))
        modulation = model.time_text_embed(timestep[one], guidance_scale[one] * 1000, pooled[one])
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, states = block(states, text, modulation, rotary)
        output = model.proj_out(model.norm_out(states, modulation))[:, : height * width]
        results.append(FluxKontextPipeline._unpack_latents(output, 4 * height, 4 * width, 2))
    return torch.cat(results)


def test_without_a_reference_any_reference_serves() -> None:
    model = tiny_flux(seed=14)
    feeds = {**inputs(SHAPES[0], seed=7), "canvas": None}
    edit = CanvasBackbone(FluxKontext(), model, None)
    draw = CanvasBackbone(Flux(), model, None)
    shared = {name: tensor for name, tensor in feeds.items() if "reference" not in name}
    with torch.no_grad():
        expected = draw(**shared)
        for reference in (feeds["reference"], torch.zeros(1, FLUX_CHANNELS, 2, 2)):
            found = edit(**shared, reference=reference, has_reference=torch.zeros(1))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (edit(**feeds | {"has_reference": torch.ones(1)}) - expected).abs().max() > 0.01


def test_metacanvas_checkpoint_is_whole(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "metacanvas", seed=51))
    canvas = checkpoint.load_canvas()
    assert checkpoint.backbone.name == "flux-kontext"
    assert canvas.pooled_connector is not None
    assert canvas.pooled_connector.proj_out.out_features == FLUX_POOLED_DIM
    assert checkpoint.load_backbone(canvas).connector is canvas.canvas_connector


def test_a_canvas_says_how_large_pictures_are(tmp_path: Path) -> None:
    """FLUX's configuration names no size. Pictures to edit keep Kontext's proportions, at the area of the checkpoint's own."""
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "metacanvas", seed=51))
    assert checkpoint.default_size == (32, 32)
    assert (20, 48) in checkpoint.reference_sizes  # of 672 x 1568, in multiples of 4 pixels
    assert (32, 32) in checkpoint.reference_sizes
    stock = load_checkpoint(tiny_stock_flux(tmp_path / "stock", seed=51))
    assert {(672, 1568), (1024, 1024)} < set(stock.reference_sizes)


def test_other_flux_pipelines_are_refused(tmp_path: Path) -> None:
    """They share the class of the model, but not what it takes."""
    folder = tiny_stock_flux(tmp_path / "checkpoint", seed=52, kind="flux", num_layers=1, num_single_layers=1)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxFillPipeline"'))
    with pytest.raises(CheckpointError, match=r"no supported backbone .* of FluxFillPipeline; .*of FluxKontextPipeline"):
        load_checkpoint(folder)
    config = tiny_flux(seed=1, in_channels=24, out_channels=16).config
    assert "takes 24 channels and gives 16" in (Flux().refusal(config) or "")
    assert Flux().refusal(tiny_flux(seed=1).config) is None


def test_schedules_follow_the_targets_tokens() -> None:
    scheduler = flux_scheduler()
    Flux().set_timesteps(scheduler)(scheduler, 5, 4096)
    high = scheduler.timesteps.clone()
    Flux().set_timesteps(scheduler)(scheduler, 5, 1024)
    assert (high[1:] > scheduler.timesteps[1:]).all()
