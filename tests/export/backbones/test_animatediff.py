"""AnimateDiff: the canvas frame by frame, the engines' programs, and parity with `AnimateDiffPipeline`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AnimateDiffPipeline, EulerDiscreteScheduler
from torch import Tensor, nn

from mc_export.backbones.animatediff import AnimateDiff
from mc_export.checkpoint import load_checkpoint
from mc_export.model.canvas_connector import CanvasConnector
from mc_export.model.injection import CanvasBackbone
from mc_export.program.step import StepProgram
from tests.export.backbones.drive import assert_same_latents
from tests.export.backbones.injected import check_plain_loop, check_zero_projections
from tests.export.backbones.stock import Stock
from tests.export.test_canvas_injection import plain_step_block
from tests.factories_unet import UNET_CONTEXT_DIM, UNET_DIM, tiny_animatediff, tiny_stock_animatediff

STEPS = 3
# (batch, frames, latent height, latent width, context rows, canvas grid)
SHAPES = [(1, 5, 8, 8, 77, (3, 4, 4)), (2, 3, 6, 10, 5, (3, 6, 10)), (3, 1, 4, 6, 9, (3, 2, 5))]


def inputs(shape: tuple, seed: int, masked: bool) -> dict[str, Tensor]:
    batch, frames, height, width, length, grid = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if masked:
        mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": torch.randn(batch, length, UNET_CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "canvas": torch.randn(batch, *grid, UNET_DIM, generator=generator),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    feeds = inputs(shape, seed=5, masked=False)

    def published(model: nn.Module) -> Tensor:
        return model(feeds["sample"], feeds["timestep"], feeds["context"].repeat_interleave(shape[1], dim=0)).sample

    check_zero_projections(AnimateDiff(), tiny_animatediff(seed=11), feeds, published)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple, masked: bool) -> None:
    feeds = inputs(shape, seed=6, masked=masked)
    check_plain_loop(AnimateDiff(), lambda: tiny_animatediff(seed=12), feeds, plain_prediction)


def plain_prediction(
    model: nn.Module,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_mask: Tensor,
    canvas: Tensor,
) -> Tensor:
    """The whole step without hooks: the UNet's parts called one by one, the connector frame by frame in plain formulas."""
    batch, _, frames, height, width = sample.shape
    emb = model.time_embedding(model.time_proj(timestep)).repeat_interleave(frames, dim=0)
    cells = model.conv_in(sample.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames))
    resized = F.interpolate(canvas.permute(0, 4, 1, 2, 3), size=(frames, height, width), mode="trilinear").transpose(1, 2)
    residuals = [
        plain_step_block(
            connector.step_block, (cells + resized)[:, frame].flatten(2).transpose(1, 2), timestep, height, width
        ).transpose(1, 2)
        for frame in range(frames)
    ]
    hidden = (cells + torch.stack(residuals, dim=1).unflatten(-1, (height, width))).flatten(0, 1)
    crossing: dict[str, Any] = {
        "encoder_hidden_states": context.repeat_interleave(frames, dim=0),
        "encoder_attention_mask": ((1 - context_mask.float()) * -10000.0)[:, None].repeat_interleave(frames, dim=0),
    }
    skipped = [hidden]
    for block in model.down_blocks:
        told = crossing if hasattr(block, "attentions") else {}
        hidden, outputs = block(hidden, emb, num_frames=frames, **told)
        skipped += outputs
    hidden = model.mid_block(hidden, emb, num_frames=frames, **crossing)
    for block in model.up_blocks:
        rest, used = skipped[: -len(block.resnets)], tuple(skipped[-len(block.resnets) :])
        told = crossing if hasattr(block, "attentions") else {}
        hidden = block(hidden, used, emb, num_frames=frames, **told)
        skipped = rest
    output = model.conv_out(F.silu(model.conv_norm_out(hidden)))
    return output.unflatten(0, (batch, frames)).transpose(1, 2)


def test_a_clip_has_as_many_frames_as_there_are_positions() -> None:
    model = tiny_animatediff(seed=2)
    program = StepProgram(CanvasBackbone(AnimateDiff(), model, None), AnimateDiff().prepared_context_width(model.config))
    assert program.axes["T"].max == model.config.motion_max_seq_length == 16


@pytest.fixture(scope="module", params=["ddim", "euler"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Stock]:
    """diffusers' pipeline and our programs of one checkpoint."""
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", timestep_spacing="linspace")
    scheduler = euler if request.param == "euler" else None
    scratch = tmp_path_factory.mktemp("stock")
    folder = tiny_stock_animatediff(scratch / "animatediff", seed=7, scheduler=scheduler)
    pipeline = AnimateDiffPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Stock(folder, STEPS, scratch)


def test_the_text_encoder_equals_the_pipelines(stock: tuple[Any, Stock]) -> None:
    pipeline, driven = stock
    prompts, negative = ["a red Circle, left of a blue square", "a photo " * 60], ["", "Blurry"]
    expected, expected_negative = pipeline.encode_prompt(prompts, "cpu", 1, True, negative_prompt=negative)
    for told, states in zip(driven.branches(prompts, negative), (expected, expected_negative), strict=True):
        assert told.mask.all()
        torch.testing.assert_close(told.context, driven.context(states), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "frames", "prompts"),
    [((32, 32), 5, ["a red circle left of a blue square"]), ((24, 40), 2, ["a cat", "two green triangles"])],
)
@pytest.mark.parametrize(("scale", "negative"), [(1.0, None), (7.5, "blurry")], ids=["off", "guided"])
def test_final_latents_equal_the_pipelines(
    stock: tuple[Any, Stock], size: tuple[int, int], frames: int, prompts: list[str], scale: float, negative: str | None
) -> None:
    pipeline, driven = stock
    (height, width), batch = size, len(prompts)
    noise = torch.randn(batch, 4, frames, height // 2, width // 2, generator=torch.Generator().manual_seed(5))
    expected = pipeline(
        prompts,
        negative_prompt=None if negative is None else [negative] * batch,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
    ).frames
    told = driven.branches(prompts, [negative or ""] * batch if scale > 1 else None)
    assert_same_latents(driven.latents(noise, told, scale), expected)


def test_what_diffusers_saves_is_one_model_and_a_spare_adapter(stock: tuple[Any, Stock]) -> None:
    checkpoint = stock[1].checkpoint
    assert set(checkpoint.index) >= {"unet", "motion_adapter"}
    assert load_checkpoint(checkpoint.path).backbone.name == "animatediff"
