"""SDXL: the canvas behind `conv_in`, the engines' programs, and parity with `StableDiffusionXLPipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from mc_export.backbones.sdxl import Sdxl
from mc_export.checkpoint import load_checkpoint
from mc_export.model.canvas_connector import CanvasConnector
from mc_export.program.text_encoder import TextEncoderProgram
from mc_runtime.errors import CheckpointError
from tests.export.backbones.drive import assert_same_latents
from tests.export.backbones.engines import Graph
from tests.export.backbones.injected import check_plain_loop, check_zero_projections
from tests.export.backbones.stock import Stock
from tests.export.test_canvas_injection import plain_step_block
from tests.factories_unet import SDXL_POOLED_DIM, UNET_CONTEXT_DIM, UNET_DIM, tiny_sdxl, tiny_stock_sdxl

STEPS = 4
# (batch, latent height, latent width, context rows, canvas grid)
SHAPES = [(1, 16, 16, 77, (1, 4, 4)), (2, 6, 10, 5, (1, 6, 10)), (3, 12, 4, 1, (1, 2, 5))]


def inputs(shape: tuple, seed: int, masked: bool) -> dict[str, Tensor]:
    batch, height, width, length, grid = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if masked:
        mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": torch.randn(batch, length, UNET_CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "pooled": torch.randn(batch, SDXL_POOLED_DIM, generator=generator),
        "size_ids": torch.tensor([[1024.0, 768, 0, 8, 640, 512]]).repeat(batch, 1) + torch.arange(batch)[:, None],
        "canvas": torch.randn(batch, *grid, UNET_DIM, generator=generator),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    feeds = inputs(shape, seed=5, masked=False)

    def published(model: nn.Module) -> Tensor:
        told = {"text_embeds": feeds["pooled"], "time_ids": feeds["size_ids"]}
        return model(feeds["sample"], feeds["timestep"], feeds["context"], added_cond_kwargs=told).sample

    check_zero_projections(Sdxl(), tiny_sdxl(seed=11), feeds, published)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple, masked: bool) -> None:
    feeds = inputs(shape, seed=6, masked=masked)
    check_plain_loop(Sdxl(), lambda: tiny_sdxl(seed=12), feeds, plain_prediction)


def plain_prediction(
    model: nn.Module,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_mask: Tensor,
    pooled: Tensor,
    size_ids: Tensor,
    canvas: Tensor,
) -> Tensor:
    """The whole step without hooks: the UNet's parts called one by one, the connector in plain formulas."""
    batch, _, height, width = sample.shape
    ids = model.add_time_proj(size_ids.flatten()).reshape(batch, -1)
    emb = model.time_embedding(model.time_proj(timestep)) + model.add_embedding(torch.cat([pooled, ids], dim=-1))
    cells = model.conv_in(sample)
    resized = F.interpolate(canvas.permute(0, 4, 1, 2, 3), size=(1, height, width), mode="trilinear")[:, :, 0]
    fused = (cells + resized).flatten(2).transpose(1, 2)
    residual = plain_step_block(connector.step_block, fused, timestep, height, width)
    hidden = cells + residual.transpose(1, 2).unflatten(2, (height, width))
    bias = ((1 - context_mask.float()) * -10000.0)[:, None]
    crossing: dict[str, Any] = {"encoder_hidden_states": context, "encoder_attention_mask": bias}
    skipped = [hidden]
    for block in model.down_blocks:
        hidden, outputs = block(hidden, emb, **crossing) if hasattr(block, "attentions") else block(hidden, emb)
        skipped += outputs
    hidden = model.mid_block(hidden, emb, **crossing)
    for block in model.up_blocks:
        rest, used = skipped[: -len(block.resnets)], tuple(skipped[-len(block.resnets) :])
        hidden = block(hidden, used, emb, **crossing) if hasattr(block, "attentions") else block(hidden, used, emb)
        skipped = rest
    return model.conv_out(F.silu(model.conv_norm_out(hidden)))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Stock]:
    """diffusers' pipeline and our programs of one checkpoint."""
    scratch = tmp_path_factory.mktemp("stock")
    folder = tiny_stock_sdxl(scratch / "sdxl", seed=7)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(folder), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Stock(folder, STEPS, scratch)


@pytest.mark.parametrize("prompts", [["a red Circle, left of a blue square"], ["a photo " * 60, "", "two green triangles"]])
def test_text_encoders_equal_the_pipelines(stock: tuple[Any, Stock], prompts: list[str]) -> None:
    pipeline, driven = stock
    negative = ["Blurry"] * len(prompts)
    context, negative_context, pooled, negative_pooled = pipeline.encode_prompt(prompts, negative_prompt=negative)
    expected = [(context, pooled), (negative_context, negative_pooled)]
    for told, (states, vector) in zip(driven.branches(prompts, negative), expected, strict=True):
        assert told.mask.all()
        torch.testing.assert_close(told.context, driven.context(states), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(told.pooled, vector, atol=2e-5, rtol=1e-4)
    first, second = driven.text.promptings
    assert first.max_tokens == second.max_tokens == 77
    assert first.pad_id != second.pad_id


def test_the_text_encoder_survives_export(stock: tuple[Any, Stock], tmp_path: Path) -> None:
    driven = stock[1]
    program = TextEncoderProgram(
        driven.backbone, driven.checkpoint.load_text_encoders(), driven.context, driven.width,
        pooled_dim=SDXL_POOLED_DIM, max_lengths=[77, 77],
    )  # fmt: skip
    graph = Graph(program, tmp_path / "text.onnx")
    assert graph.onnxruntime_error({"B": 3, "L": 77}) <= 2e-5
    assert graph.onnxruntime_error({"B": 1, "L": 6}) <= 2e-5


@pytest.mark.parametrize(
    ("size", "prompts"), [((32, 32), ["a red circle left of a blue square"]), ((24, 40), ["a cat", "two green triangles"])]
)
@pytest.mark.parametrize(("scale", "negative"), [(1.0, None), (5.0, None), (5.0, "blurry")], ids=["off", "zeros", "negative"])
def test_final_latents_equal_the_pipelines(
    stock: tuple[Any, Stock], size: tuple[int, int], prompts: list[str], scale: float, negative: str | None
) -> None:
    pipeline, driven = stock
    (height, width), batch = size, len(prompts)
    noise = torch.randn(batch, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(5))
    expected = pipeline(
        prompts,
        negative_prompt=None if negative is None else [negative] * batch,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
    ).images
    told = driven.branches(prompts, [negative or ""] * batch if scale > 1 else None)
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(batch, 1)
    assert_same_latents(driven.latents(noise, told, scale, {"size_ids": ids}), expected)


def test_what_is_no_sdxl_is_refused(tmp_path: Path) -> None:
    folder = tiny_stock_sdxl(tmp_path / "sdxl")
    plain = UNet2DConditionModel(
        block_out_channels=(32, 32), norm_num_groups=16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=UNET_CONTEXT_DIM,
    )  # fmt: skip
    for unet, named in ((plain, "addition_embed_type is None"), (tiny_sdxl(1, in_channels=9), "in_channels is 9")):
        unet.save_pretrained(folder / "unet")
        with pytest.raises(CheckpointError, match=named):
            _ = load_checkpoint(folder).model_config


@pytest.mark.parametrize("forced", [True, False])
def test_the_pipeline_says_what_an_empty_negative_prompt_is(tmp_path: Path, forced: bool) -> None:
    folder = tiny_stock_sdxl(tmp_path / "sdxl", force_zeros_for_empty_prompt=forced)
    assert load_checkpoint(folder).zeroes_empty_negative == forced
