"""Stable Video Diffusion: the canvas on the noisy frames, the engines' programs, and parity with its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from PIL import Image
from torch import Tensor, nn

from mc_export.backbones.svd import StableVideoDiffusion
from mc_export.model.antialiasing import antialiased_resize_matrix
from mc_export.model.canvas_connector import CanvasConnector
from mc_export.program.image_encoder import ImageEncoderProgram
from tests.export.backbones.drive import Told, assert_same_latents
from tests.export.backbones.engines import Graph
from tests.export.backbones.injected import check_plain_loop, check_zero_projections
from tests.export.backbones.stock import Stock, without
from tests.export.test_canvas_injection import plain_step_block
from tests.factories_unet import UNET_CONTEXT_DIM, UNET_DIM, tiny_stock_svd, tiny_svd

STEPS = 4
# (batch, frames, latent height, latent width, context rows, canvas grid)
SHAPES = [(1, 5, 8, 8, 1, (3, 4, 4)), (2, 3, 6, 10, 7, (3, 6, 10)), (3, 1, 4, 6, 9, (3, 2, 5))]


def inputs(shape: tuple, seed: int, masked: bool) -> dict[str, Tensor]:
    batch, frames, height, width, length, grid = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if masked:
        mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 3 - 1.5,
        "context": torch.randn(batch, length, UNET_CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "image_latents": torch.randn(batch, 4, height, width, generator=generator),
        "motion_ids": torch.tensor([[6.0, 127, 0.02]]).repeat(batch, 1) + torch.arange(batch)[:, None],
        "canvas": torch.randn(batch, *grid, UNET_DIM, generator=generator),
    }


def model_input(sample: Tensor, image_latents: Tensor) -> Tensor:
    """As the pipeline concatenates them: `[B, T, 2 C, H, W]`."""
    frames = image_latents[:, None].repeat(1, sample.shape[2], 1, 1, 1)
    return torch.cat([sample.transpose(1, 2), frames], dim=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    feeds = inputs(shape, seed=5, masked=False)

    def published(model: nn.Module) -> Tensor:
        frames = model_input(feeds["sample"], feeds["image_latents"])
        return model(frames, feeds["timestep"], feeds["context"], feeds["motion_ids"]).sample.transpose(1, 2)

    check_zero_projections(StableVideoDiffusion(), tiny_svd(seed=11), feeds, published)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple, masked: bool) -> None:
    feeds = inputs(shape, seed=6, masked=masked)
    check_plain_loop(StableVideoDiffusion(), lambda: tiny_svd(seed=12), feeds, plain_prediction)


def plain_prediction(model: nn.Module, connector: CanvasConnector, **feeds: Tensor) -> Tensor:
    """The whole step without hooks, one sample at a time, so that a masked context is simply a shorter one."""
    rows = []
    for index in range(len(feeds["sample"])):
        one = {name: tensor[index : index + 1] for name, tensor in feeds.items()}
        one["context"] = one["context"][:, : int(one.pop("context_mask").sum())]
        rows.append(plain_sample(model, connector, **one))
    return torch.cat(rows)


def plain_sample(
    model: nn.Module,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    image_latents: Tensor,
    motion_ids: Tensor,
    canvas: Tensor,
) -> Tensor:
    """The UNet's parts called one by one, the connector frame by frame in plain formulas."""
    _, _, frames, height, width = sample.shape
    emb = model.time_embedding(model.time_proj(timestep))
    emb = emb + model.add_embedding(model.add_time_proj(motion_ids.flatten()).reshape(1, -1))
    emb, context = emb.expand(frames, -1), context.expand(frames, -1, -1)
    cells = model.conv_in(model_input(sample, image_latents)[0])
    resized = F.interpolate(canvas.permute(0, 4, 1, 2, 3), size=(frames, height, width), mode="trilinear")[0].transpose(0, 1)
    fused = (cells + resized).flatten(2).transpose(1, 2)
    residual = plain_step_block(connector.step_block, fused, timestep.expand(frames), height, width)
    hidden = cells + residual.transpose(1, 2).unflatten(2, (height, width))
    video: dict[str, Any] = {"temb": emb, "image_only_indicator": torch.zeros(1, frames)}
    skipped = [hidden]
    for block in model.down_blocks:
        told = {**video, "encoder_hidden_states": context} if hasattr(block, "attentions") else video
        hidden, outputs = block(hidden, **told)
        skipped += outputs
    hidden = model.mid_block(hidden, encoder_hidden_states=context, **video)
    for block in model.up_blocks:
        rest, used = skipped[: -len(block.resnets)], tuple(skipped[-len(block.resnets) :])
        told = {**video, "encoder_hidden_states": context} if hasattr(block, "attentions") else video
        hidden = block(hidden, res_hidden_states_tuple=used, **told)
        skipped = rest
    return model.conv_out(F.silu(model.conv_norm_out(hidden))).transpose(0, 1)[None]


@pytest.mark.parametrize("size", [(224, 224), (1024, 576), (225, 223), (16, 300), (336, 449), (2000, 1125)])
def test_the_resize_equals_the_pipelines(size: tuple[int, int]) -> None:
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(4))
    expected = _resize_with_antialiasing(picture, (224, 224))
    rows, columns = (antialiased_resize_matrix(side, 224) for side in size)
    torch.testing.assert_close(rows @ picture @ columns.T, expected, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Stock]:
    """diffusers' pipeline and our programs of one checkpoint."""
    scratch = tmp_path_factory.mktemp("stock")
    folder = tiny_stock_svd(scratch / "svd", seed=7)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, Stock(folder, STEPS, scratch)


@pytest.fixture(scope="module")
def image_encoder(stock: tuple[Any, Stock]) -> ImageEncoderProgram:
    driven = stock[1]
    mean, deviation = driven.checkpoint.image_statistics
    encoder = driven.checkpoint.load_image_encoder()
    return ImageEncoderProgram(encoder, mean, deviation, driven.context, driven.width).eval()


def pictures(count: int, size: tuple[int, int]) -> list[Image.Image]:
    numbers = np.random.default_rng(9)
    coarse = numbers.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC) for one in coarse]


def unit(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]).astype(np.float32) / 255)


@pytest.mark.parametrize(("count", "size"), [(1, (300, 400)), (2, (90, 61))])
def test_the_image_encoder_equals_the_pipelines(
    stock: tuple[Any, Stock], image_encoder: ImageEncoderProgram, count: int, size: tuple[int, int]
) -> None:
    pipeline, driven = stock
    images = pictures(count, size)
    expected = driven.context(pipeline._encode_image(images, "cpu", 1, False))
    actual = image_encoder.run({"pixels": unit(images)})["context"]
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)


def test_the_image_encoder_survives_export(image_encoder: ImageEncoderProgram, tmp_path: Path) -> None:
    graph = Graph(image_encoder, tmp_path / "image_encoder.onnx")
    assert graph.onnxruntime_error({"B": 1, "h": 1024, "w": 577}) <= 2e-5
    assert graph.onnxruntime_error({"B": 3, "h": 33, "w": 500}) <= 2e-5
    assert graph.openvino_error({"B": 1, "h": 600, "w": 411}, "bf16") <= 0.05


@pytest.mark.parametrize(("size", "frames", "count"), [((24, 40), 5, 1), ((32, 16), 2, 2)])
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["off", "ramp"])
def test_final_latents_equal_the_pipelines(
    stock: tuple[Any, Stock],
    image_encoder: ImageEncoderProgram,
    size: tuple[int, int],
    frames: int,
    count: int,
    scale: float,
) -> None:
    pipeline, driven = stock
    (height, width), strength, images = size, 0.05, pictures(count, (64, 50))
    noise = torch.randn(count, 4, frames, height // 2, width // 2, generator=torch.Generator().manual_seed(5))
    expected = pipeline(
        images,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        max_guidance_scale=scale,
        fps=9,
        motion_bucket_id=90,
        noise_aug_strength=strength,
        latents=noise.transpose(1, 2),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
    resized = unit([image.resize((width, height), Image.Resampling.LANCZOS) for image in images])
    # The pipeline draws this noise in the layout of its own pixels, channels first, in [-1, 1].
    drawn = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3)).permute(0, 2, 3, 1)
    noisy = resized + strength / 2 * drawn
    with torch.no_grad():
        latents = driven.checkpoint.load_vae().encode(noisy.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    told = Told(image_encoder.run({"pixels": unit(images)})["context"], torch.ones(count, 1, dtype=torch.int64), None)
    guided = scale > 1
    conditions = {
        "image_latents": torch.stack([latents, torch.zeros_like(latents)] if guided else [latents], dim=1),
        "motion_ids": torch.tensor([[9.0 - 1, 90, strength]]).repeat(count, 1),
    }
    actual = driven.latents(noise, [told, without(told)] if guided else [told], scale, conditions)
    assert_same_latents(actual, expected.transpose(1, 2))
