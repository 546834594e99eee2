"""A planner with eyes: the vision tower and the planner as engines, against transformers' own tower and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from mc_export.build.build import build_bundle
from mc_export.build.options import BuildOptions
from mc_export.build.verify import verify_engine
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.lower import lower
from mc_export.lower.onnx import onnx_from_program
from mc_export.program.export import export_program
from mc_export.program.vision import VisionProgram
from mc_export.quantize.calibration import calibration_inputs
from mc_export.reference import ReferencePipeline
from mc_export.reference.pictures import PictureReader, encode_with_pictures
from mc_export.vision import planner_vision
from mc_runtime.backends.base import Settings
from mc_runtime.bundle.manifest import Engine, Precision
from mc_runtime.bundle.store import Bundle, open_bundle
from mc_runtime.bundle.vision import Vision
from mc_runtime.media.clip import Clip
from mc_runtime.prompting import Grid
from mc_runtime.prompting.vision import tower_indices
from mc_runtime.runtime.engines import Engines
from mc_runtime.runtime.planning import Planning
from mc_runtime.runtime.work import EngineClock
from tests.factories import tiny_metacanvas_checkpoint, tiny_planner
from tests.tiny_processors import drawn

PROMPT = {"image_tokens": 12, "frame_tokens": 6, "max_vision_tokens": 128, "max_tokens": 96, "max_frames": 6}


MEDIA: dict[str, list[Any]] = {
    "a picture": [drawn(1, 61, 127)],
    "two pictures and a clip": [drawn(2, 90, 33), Image.fromarray(drawn(3, 45, 140)), Clip(drawn(4, 13, 50, 71), fps=6.0)],
    "a clip before a picture": [Clip(drawn(5, 3, 64, 40), fps=1.5), drawn(6, 200, 160)],
}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("eyes") / "checkpoint"
    return load_checkpoint(
        tiny_metacanvas_checkpoint(folder, seed=21, lora=True, tasks=("text-to-image", "image-editing"), prompt=PROMPT)
    )


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> ReferencePipeline:
    return ReferencePipeline(checkpoint)


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("eyes") / "bundle"
    build_bundle(checkpoint.path, path, BuildOptions(sizes=((32, 32), (24, 40)), max_batch=2, max_steps=4))
    return open_bundle(path)


@pytest.fixture
def planning(bundle: Bundle) -> Planning:
    return Planning(bundle, Engines(bundle, Settings()))


@pytest.fixture(scope="module")
def tower() -> Qwen2_5_VisionTransformerPretrainedModel:
    """Three blocks: windows, whole frames, windows. Its biases and norms are random, so that each counts."""
    torch.manual_seed(7)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24,
            "fullatt_block_indexes": [1],
        }
    ).vision_config  # fmt: skip
    model = Qwen2_5_VisionTransformerPretrainedModel._from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model


def spec_of(bundle: Bundle) -> Vision:
    planner = bundle.manifest.prompting.planner
    assert planner is not None
    assert planner.vision is not None
    return planner.vision


GRIDS = [
    [Grid(1, 4, 4)],
    [Grid(1, 1, 1)],
    [Grid(1, 5, 3), Grid(1, 9, 2)],
    [Grid(3, 2, 9), Grid(1, 7, 6), Grid(2, 3, 3)],
]


def tower_feed(grids: list[Grid], spec: Vision, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random patches with the indices of these grids, and the grids in patches."""
    tokens = sum(grid.tokens for grid in grids)
    pixels = torch.randn(tokens, 4, spec.patch_values, generator=torch.Generator().manual_seed(seed))
    indices = {name: torch.from_numpy(array) for name, array in tower_indices(grids, spec).items()}
    return {"pixels": pixels, **indices}, torch.tensor([[grid.t, 2 * grid.h, 2 * grid.w] for grid in grids])


def test_the_tower_equals_transformers_at_any_grid(tower: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As a module and, exported once, as an engine: odd grids, one-token pictures, several pictures, clips."""
    spec = planner_vision(checkpoint)
    assert spec is not None
    program = VisionProgram(tower, max_tokens=256).eval()
    feeds = []
    for seed, grids in enumerate(GRIDS):
        feed, thw = tower_feed(grids, spec, seed)
        with torch.no_grad():
            expected = tower(feed["pixels"].flatten(0, 1), grid_thw=thw).pooler_output
        torch.testing.assert_close(program.run(feed)["vision"], expected, atol=1e-5, rtol=1e-5)
        assert expected.abs().max() > 0.1
        feeds.append(feed)
    graph = onnx_from_program(export_program(program), program.inputs, program.outputs, tmp_path / "vision.onnx")
    for target in ("onnxruntime", "openvino"):
        folder = tmp_path / target
        folder.mkdir()
        files, options = lower(target, graph, "vision", Precision.FP32, [], folder)
        engine = Engine(
            target=target, precision=Precision.FP32, files=tuple(file.name for file in files), inputs=program.inputs,
            outputs=program.outputs, options=options,
        )  # fmt: skip
        error = verify_engine(program, engine, files, feeds, tolerance=2e-5)
        assert len(error.shapes) == len(GRIDS)
        assert error.relative_l2 > 0


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("media", MEDIA)
def test_plans_with_pictures_equal_the_references(
    planning: Planning, reference: ReferencePipeline, media: str, size: tuple[int, int]
) -> None:
    """Host code, vision and planner engines against transformers' processor, tower and positions; with a LoRA."""
    seen = planning.look(MEDIA[media])
    prompt = "make the red circle blue, 猫"
    branch = planning.branch(planning.encode(prompt, seen=seen), size, EngineClock())
    with torch.inference_mode():
        expected = reference.conditions([prompt], size, media=MEDIA[media])
    assert expected.canvas is not None
    prepare = reference.backbone.backbone.context_preparation(reference.backbone.model)
    with torch.inference_mode():
        context = prepare(expected.context)[0].numpy()
    assert relative(branch.context, context) <= 2e-5
    assert branch.canvas is not None
    assert relative(branch.canvas, expected.canvas[0].numpy()) <= 2e-5
    np.testing.assert_array_equal(branch.context_mask, expected.mask[0].numpy())
    assert len(branch.context) > sum(one.grid.tokens for one in seen), "the pictures' rows are context too"


def test_pictures_their_order_and_their_speed_matter(planning: Planning) -> None:
    one, other = drawn(1, 60, 60), drawn(2, 60, 60)
    clips = [Clip(drawn(3, 6, 40, 40), fps=fps) for fps in (2.0, 8.0)]

    def plan(media: list[Any]) -> np.ndarray:
        branch = planning.branch(planning.encode("a", seen=planning.look(media)), (32, 32), EngineClock())
        assert branch.canvas is not None
        return branch.canvas

    plans = [plan(media) for media in ([], [one], [other], [one, other], [other, one], [clips[0]], [clips[1]])]
    for index, first in enumerate(plans):
        assert all(relative(first, second) > 1e-4 for second in plans[index + 1 :])
    np.testing.assert_array_equal(plan([one, other]), plans[3])


def test_a_picture_that_was_seen_is_not_seen_again(planning: Planning) -> None:
    picture, clock, runs = drawn(1, 60, 60), EngineClock(), []
    engine = planning._engines.get("vision")
    run = engine.run
    engine.run = lambda *arguments: runs.append(1) or run(*arguments)  # type: ignore[method-assign, func-returns-value]
    for prompt in ("a", "b", "a"):
        planning.branch(planning.encode(prompt, seen=planning.look([picture])), (32, 32), clock)
    planning.branch(planning.encode("a", seen=planning.look([drawn(2, 60, 60), picture])), (32, 32), clock)
    assert len(runs) == 2


def test_a_negative_prompt_may_be_empty_and_see(planning: Planning) -> None:
    seen = planning.look([drawn(1, 60, 60)])
    blind = planning.encode("", negative=True)
    assert blind.is_empty_negative
    sees = planning.encode("", negative=True, seen=seen)
    assert not sees.is_empty_negative
    branches = [planning.branch(prompt, (32, 32), EngineClock()) for prompt in (blind, sees)]
    assert len(branches[1].context) == len(branches[0].context) + seen[0].grid.tokens + 2
    assert planning.rows(sees, (32, 32)) == len(branches[1].context)


def test_texts_of_a_seeing_bundle_equal_the_reference(planning: Planning, reference: ReferencePipeline) -> None:
    branch = planning.branch(planning.encode("two green triangles"), (32, 32), EngineClock())
    with torch.inference_mode():
        expected = reference.conditions(["two green triangles"], (32, 32))
    assert expected.canvas is not None
    assert branch.canvas is not None
    assert relative(branch.canvas, expected.canvas[0].numpy()) <= 2e-5


@torch.inference_mode()
def test_a_batch_sees_what_each_prompt_sees_alone(reference: ReferencePipeline) -> None:
    assert reference.planner is not None
    assert reference.checkpoint.config is not None
    pictures = PictureReader(reference.checkpoint)(MEDIA["two pictures and a clip"])
    prompts = ["a cat", "two green triangles above a yellow square"]

    def states(texts: list[str]) -> Any:
        encoded = encode_with_pictures(
            reference.planner, reference.planner_tokenizer, reference.checkpoint.config, texts, (1, 3, 5), pictures
        )
        return reference.planner(**encoded), encoded["attention_mask"].sum(dim=1)

    both, lengths = states(prompts)
    for index, prompt in enumerate(prompts):
        alone, _ = states([prompt])
        torch.testing.assert_close(both.context[index, : lengths[index]], alone.context[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both.canvas[index], alone.canvas[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_reference_is_transformers_own_forward(reference: ReferencePipeline) -> None:
    """Up to the end token, the planner's states are those of `Qwen2_5_VLModel` with pixels, grids and no help of ours."""
    checkpoint = reference.checkpoint
    pictures = PictureReader(checkpoint)(MEDIA["two pictures and a clip"])
    assert reference.planner is not None
    encoded = encode_with_pictures(
        reference.planner, reference.planner_tokenizer, checkpoint.config, ["a cat"], (1, 4, 4), pictures
    )
    qwen = tiny_planner(21).model
    ids = encoded["input_ids"]
    expected = qwen(
        input_ids=ids,
        attention_mask=encoded["attention_mask"],
        mm_token_type_ids=(ids == qwen.config.image_token_id).int() + 2 * (ids == qwen.config.video_token_id).int(),
        pixel_values=pictures.patches["image"],
        image_grid_thw=pictures.grid_thw["image"],
        pixel_values_videos=pictures.patches["video"],
        video_grid_thw=pictures.grid_thw["video"],
        second_per_grid_ts=torch.tensor(pictures.seconds),
    ).last_hidden_state
    torch.testing.assert_close(reference.planner(**encoded).context, expected, atol=1e-5, rtol=1e-4)


def test_the_manifest_says_how_pictures_are_read(bundle: Bundle) -> None:
    spec = spec_of(bundle)
    assert spec.image_pixels == (12 * 784, 12 * 784)
    assert spec.clip_pixels == (6 * 784, 6 * 784)
    assert (spec.max_tokens, spec.max_frames, spec.min_frames, spec.clip_fps) == (128, 6, 4, 2.0)
    assert (spec.image_token_id, spec.clip_token_id, spec.tokens_per_second) == (6, 7, 4.0)
    assert spec.image_text == "<|vision_start|><|image_pad|><|vision_end|>"
    assert "vision" in bundle.manifest.engines


def test_int8_is_calibrated_on_pictures(checkpoint: Checkpoint) -> None:
    names = {spec.name for spec in VisionProgram(checkpoint.load_vision_tower()).inputs}
    assert all(set(feed) == names for feed in calibration_inputs(checkpoint, "vision"))
    assert all((feed["vision_index"] >= 0).any() for feed in calibration_inputs(checkpoint, "planner"))
