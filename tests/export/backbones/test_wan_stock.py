"""Stock Wan: its text and videos by our programs, and by the reference, against diffusers' pipelines."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from PIL import Image
from torch import Tensor

from mc_export.autoencoders.registry import vae_program
from mc_export.backbones.wan import Wan
from mc_export.checkpoint import load_checkpoint
from mc_export.lower.onnx import onnx_from_program
from mc_export.model.injection import CanvasBackbone
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_export.reference import ReferencePipeline
from mc_runtime.errors import CheckpointError
from mc_runtime.prompting.template import normalized
from tests.export.backbones.drive import TextDrive, assert_same_latents, denoise, schedule_of
from tests.export.test_autoencoders import through
from tests.tiny_wan import noise_of, tiny_stock_wan

STEPS = 4


def test_clean_prompts_are_the_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan, "is_ftfy_available", lambda: False)
    generator = np.random.default_rng(1)
    pieces = ["a cat", " ", "\t\n", "&amp;amp;lt;", "&eacute;", "\u00a0", "\u3000", "ñ", "<b>", "&", "\x1f", "&nbsp;x"]
    for _ in range(200):
        prompt = "".join(generator.choice(pieces, size=generator.integers(0, 8)))
        assert normalized(prompt, "clean") == pipeline_wan.prompt_clean(prompt)


class Stock:
    """A stock checkpoint saved by diffusers: its pipeline, and our programs of it."""

    def __init__(self, folder: Path, image_to_video: bool) -> None:
        path = str(tiny_stock_wan(folder / "checkpoint", seed=31, image_to_video=image_to_video))
        kind = WanImageToVideoPipeline if image_to_video else WanPipeline
        self.pipeline, own = kind.from_pretrained(path), kind.from_pretrained(path)
        self.pipeline.set_progress_bar_config(disable=True)
        self.text = TextDrive(Wan(), [own.text_encoder], [own.tokenizer], own.transformer, folder)
        self.schedule = schedule_of(Wan(), own.transformer, own.scheduler, STEPS)
        width = Wan().prepared_context_width(own.transformer.config)
        self.step = StepProgram(CanvasBackbone(Wan(), own.transformer, None), width, order=self.schedule.order).eval()


@pytest.fixture(scope="module")
def text_to_video(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(tmp_path_factory.mktemp("text_to_video"), image_to_video=False)


@pytest.fixture(scope="module")
def image_to_video(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(tmp_path_factory.mktemp("image_to_video"), image_to_video=True)


PROMPTS = ["a red  circle moves left &amp; the square moves right", "cat"]
CASES = list(itertools.product([(32, 48), (64, 32)], [1, 2], [5, 9], [1.0, 5.0]))


def told(stock: Stock, prompts: list[str], scale: float, negative: str) -> dict[str, Any]:
    branches = [stock.text(prompts)]
    if scale == 1.0:
        return {"branches": branches, "weights": [1.0]}
    return {"branches": [*branches, stock.text([negative] * len(prompts), negative=True)], "weights": [scale, 1 - scale]}


def test_text_encoder_gives_the_pipelines_context(text_to_video: Stock) -> None:
    prompts = [*PROMPTS, "", "the square " * 300]
    own = text_to_video.text(prompts[:3])
    longest = text_to_video.text(prompts[3:])
    with torch.no_grad():
        expected = text_to_video.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)[0]
        prepared = text_to_video.text.program.context(expected)
    assert own.mask.sum(dim=1).tolist() == [512, 512, 512]
    for row in range(3):
        unfolded = own.context[row].repeat_interleave(own.mask[row], dim=0)
        torch.testing.assert_close(unfolded, prepared[row], atol=2e-5, rtol=1e-4)
    assert longest.mask.tolist() == [[1] * 512], "a prompt that was cut has no padding"
    torch.testing.assert_close(longest.context[0], prepared[3], atol=2e-5, rtol=1e-4)


def test_exported_text_encoder_equals_torch(text_to_video: Stock, tmp_path: Path) -> None:
    program = text_to_video.text.program
    graph = onnx_from_program(export_program(program), program.inputs, program.outputs, tmp_path / "text_encoder.onnx")
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (3, 33), (1, 300)):
        feed = program.example({"B": batch, "L": length}, seed=length)
        result = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})[0]
        expected = program.run(feed)["context"]
        assert np.linalg.norm(result - expected.numpy()) / np.linalg.norm(expected) <= 2e-5


@pytest.mark.parametrize(("size", "batch", "frames", "scale"), CASES)
def test_text_to_video_equals_the_pipeline(
    text_to_video: Stock, size: tuple[int, int], batch: int, frames: int, scale: float
) -> None:
    noise, negative = noise_of(batch, frames, size), "blurry; a square" if frames == 5 else ""
    expected = text_to_video.pipeline(
        PROMPTS[:batch], negative_prompt=[negative] * batch, height=size[0], width=size[1], num_frames=frames,
        num_inference_steps=STEPS, guidance_scale=scale, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    none = {"first_frame": torch.zeros_like(noise[:, :, :1]), "has_first_frame": torch.zeros(batch)}
    arguments = told(text_to_video, PROMPTS[:batch], scale, negative)
    assert_same_latents(denoise(text_to_video.step, text_to_video.schedule, noise, conditions=none, **arguments), expected)


@pytest.mark.parametrize(("size", "batch", "frames", "scale"), CASES[::3])
def test_image_to_video_equals_the_pipeline(
    image_to_video: Stock,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    batch: int,
    frames: int,
    scale: float,
) -> None:
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan.prompt_clean)  # the one that does without ftfy
    noise, pipeline = noise_of(batch, frames, size, seed=7), image_to_video.pipeline
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8))
    expected = pipeline(
        picture, PROMPTS[:batch], negative_prompt=["blurry"] * batch, height=size[0], width=size[1], num_frames=frames,
        num_inference_steps=STEPS, guidance_scale=scale, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    first = first_frame(pipeline.vae, picture)
    given = {"first_frame": first.expand(batch, -1, -1, -1, -1), "has_first_frame": torch.ones(batch)}
    arguments = told(image_to_video, PROMPTS[:batch], scale, "blurry")
    latents = denoise(image_to_video.step, image_to_video.schedule, noise, conditions=given, **arguments)
    assert_same_latents(latents, expected)
    assert torch.equal(latents[:, :, 0], given["first_frame"][:, :, 0])


def first_frame(vae: Any, picture: Image.Image) -> Tensor:
    """The clean first latent frame `[1, C, 1, H, W]`, by the engine's program."""
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 255)
    return vae_program("vae_encoder", vae).run({"pixels": pixels[None, None]})["latents"]


@pytest.mark.parametrize("frames", [1, 9])
def test_videos_equal_the_pipelines(text_to_video: Stock, frames: int) -> None:
    size, noise, pipeline = (32, 48), noise_of(2, frames, (32, 48), seed=8), text_to_video.pipeline
    expected = pipeline(
        PROMPTS, height=size[0], width=size[1], num_frames=frames, num_inference_steps=STEPS, guidance_scale=5.0,
        latents=noise, output_type="np",
    ).frames  # fmt: skip
    none = {"first_frame": torch.zeros_like(noise[:, :, :1]), "has_first_frame": torch.zeros(2)}
    arguments = told(text_to_video, PROMPTS, 5.0, "")
    latents = denoise(text_to_video.step, text_to_video.schedule, noise, conditions=none, **arguments)
    decoders = [vae_program(component, pipeline.vae) for component in ("vae_decoder", "vae_decoder_next")]
    pixels = through(*decoders, list(latents.split(1, dim=2)), "latents", "pixels").numpy()
    assert pixels.shape == expected.shape == (2, frames, *size, 3)
    assert np.abs(pixels - expected).mean() <= 1 / 255


def test_reference_equals_the_pipeline(text_to_video: Stock, tmp_path: Path) -> None:
    noise = noise_of(2, 5, (32, 48), seed=9)
    expected = text_to_video.pipeline(
        PROMPTS, negative_prompt=["blurry"] * 2, height=32, width=48, num_frames=5, num_inference_steps=STEPS,
        guidance_scale=3.0, latents=noise, output_type="latent",
    ).frames  # fmt: skip
    text_to_video.pipeline.save_pretrained(str(tmp_path))
    result = ReferencePipeline.from_checkpoint(tmp_path).generate(
        PROMPTS, negative_prompt="blurry", size=(32, 48), frames=5, steps=STEPS, guidance_scale=3.0, latents=noise.numpy(),
        output="latents",
    )  # fmt: skip
    assert_same_latents(torch.from_numpy(result.latents), expected)


@pytest.mark.parametrize("name", ["transformer_2", "image_encoder"])
def test_pipelines_of_two_models_are_refused(text_to_video: Stock, tmp_path: Path, name: str) -> None:
    text_to_video.pipeline.save_pretrained(str(tmp_path))
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {name: index["transformer"]}))
    with pytest.raises(CheckpointError, match=f"has a '{name}': .* use Wan2.2-TI2V-5B"):
        load_checkpoint(tmp_path)
