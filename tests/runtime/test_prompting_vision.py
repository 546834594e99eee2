"""Pictures and clips to pixels, indices, ids and positions, against transformers' own processor, tower and model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mc_export.model.config import CanvasConfig, MetaCanvasConfig, PromptConfig
from mc_export.prompting import planner_prompting
from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import CheckpointError, RequestError
from mc_runtime.prompting import Clip, Grid, Prompter, look_at, tower_inputs
from mc_runtime.prompting.pixels import clip_frames, patches, picture_frames, resized_size, sampled_frames
from mc_runtime.prompting.vision import tower_indices
from tests.tiny_processors import VideoProcessor, seeing_processor
from tests.tiny_tokenizers import qwen_processor, qwen_tokenizer

CONFIG = MetaCanvasConfig(canvas=CanvasConfig(grid=(1, 4, 4), pixels_per_token=8), prompt=PromptConfig(max_tokens=128))
SPEC = Vision(
    patch=14,
    temporal_patch=2,
    merge=2,
    window=112,
    image_pixels=(4 * 784, 30 * 784),
    clip_pixels=(2 * 784, 12 * 784),
    mean=tuple(OPENAI_CLIP_MEAN),
    std=tuple(OPENAI_CLIP_STD),
    tokens_per_second=2,
    image_token_id=qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>"),
    clip_token_id=qwen_tokenizer().convert_tokens_to_ids("<|video_pad|>"),
    image_text="<|vision_start|><|image_pad|><|vision_end|>",
    clip_text="<|vision_start|><|video_pad|><|vision_end|>",
    clip_fps=2.0,
    min_frames=4,
    max_frames=10,
    max_media=4,
    max_tokens=128,
)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def processor() -> Any:
    return seeing_processor(SPEC)


@pytest.fixture(scope="module")
def prompter(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("bundle")
    return Prompter(planner_prompting(processor, CONFIG, folder, vision=SPEC), folder)


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "tokens_per_second": 2},
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), least=st.integers(1, 300_000), more=st.integers(0, 3_000_000)
)
def test_sizes_follow_the_models_own_rule(height: int, width: int, least: int, more: int) -> None:
    limits = (least, max(784, least + more))
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(RequestError, match="too narrow"):
            resized_size(height, width, 28, *limits)
    else:
        assert resized_size(height, width, 28, *limits) == smart_resize(height, width, 28, *limits)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (37, 211), (300, 41), (140, 140), (3, 500)])
def test_pictures_equal_the_processors(processor: Any, size: tuple[int, int]) -> None:
    pixels = drawn(size[1], *size)
    expected = processor.image_processor(Image.fromarray(pixels), return_tensors="np")
    for picture in (pixels, Image.fromarray(pixels), (pixels / 255).astype(np.float32)):
        frames = picture_frames(picture, SPEC)
        found = patches(frames, SPEC)
        np.testing.assert_array_equal(found.reshape(-1, SPEC.patch_values), expected["pixel_values"])
        assert [1, frames.shape[1] // 14, frames.shape[2] // 14] == expected["image_grid_thw"][0].tolist()
        assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("frames", "size", "fps"), [(1, (56, 84), 8.0), (5, (30, 70), 2.0), (9, (61, 45), 3.0), (48, (40, 40), 24)]
)
def test_clips_equal_the_processors(frames: int, size: tuple[int, int], fps: float) -> None:
    """Sampled first; the values are only close: the video processor divides by 255 * std in one go."""
    video = drawn(frames, frames, *size)
    processor = VideoProcessor(size={"shortest_edge": SPEC.clip_pixels[0], "longest_edge": SPEC.clip_pixels[1]})
    taken, seconds = sampled_frames(frames, fps, SPEC)
    expected = processor(torch.from_numpy(video[taken]).permute(0, 3, 1, 2), return_tensors="np", do_sample_frames=False)
    shown, lasts = clip_frames(Clip(video, fps), SPEC)
    assert lasts == seconds
    found = patches(shown, SPEC).reshape(-1, SPEC.patch_values)
    np.testing.assert_allclose(found, expected["pixel_values_videos"], atol=2e-6)
    assert expected["video_grid_thw"][0].tolist() == [-(-len(shown) // 2), shown.shape[1] // 14, shown.shape[2] // 14]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    count=st.integers(2, 2000), fps=st.floats(0.5, 120), wanted=st.sampled_from([None, 0.5, 2.0, 3.7]), most=st.integers(4, 768)
)
def test_frames_are_sampled_as_the_processor_samples(count: int, fps: float, wanted: float | None, most: int) -> None:
    spec = replace(SPEC, clip_fps=wanted, max_frames=most)
    if wanted is None and count > most:
        with pytest.raises(RequestError, match=f"{count} frames.*{most}"):
            sampled_frames(count, fps, spec)
        return
    metadata = VideoMetadata(total_num_frames=count, fps=fps)
    expected = VideoProcessor().sample_frames(metadata, min_frames=4, max_frames=most, fps=wanted).tolist() if wanted else None
    # Its floats can name one frame more, behind the last (count 133, fps 1, wanted 0.5, most 26), which no clip has.
    metadata.frames_indices = list(range(count)) if expected is None else [index for index in expected if index < count]
    taken, seconds = sampled_frames(count, fps, spec)
    assert taken == metadata.frames_indices
    assert seconds == pytest.approx(2 / metadata.sampled_fps, rel=1e-12)


@pytest.mark.parametrize(
    "grids",
    [[Grid(1, 4, 4)], [Grid(1, 1, 1)], [Grid(1, 5, 3), Grid(3, 2, 9)], [Grid(2, 8, 7), Grid(1, 3, 12), Grid(5, 1, 1)]],
)
def test_the_towers_indices_equal_its_own(grids: list[Grid]) -> None:
    thw = torch.tensor([[grid.t, grid.h * 2, grid.w * 2] for grid in grids])
    found = tower_indices(grids, SPEC)
    np.testing.assert_array_equal(found["positions"].reshape(-1, 2), get_vision_position_ids(thw, 2).numpy())
    index, bounds = get_vision_window_index(thw, 2, 112, 14)
    patches_of = (index[:, None] * 4 + torch.arange(4)).flatten()
    for name, order, starts in (
        ("window", patches_of, bounds),
        ("frame", torch.arange(len(patches_of)), get_vision_cu_seqlens(thw)),
    ):
        groups = [order[start:end].tolist() for start, end in itertools.pairwise(starts)]
        members = found[f"{name}s"]
        assert [row[row >= 0].tolist() for row in members] == groups
        assert all((row[len(group) :] == -1).all() for row, group in zip(members, groups, strict=True))
        np.testing.assert_array_equal(members.flatten()[found[f"{name}_places"].flatten()], np.arange(len(order)))
    assert found["windows"].shape[1] == 64
    assert found["frames"].shape[1] == max(grid.h * grid.w for grid in grids) * 4


CASES: list[list[str]] = [["image"], ["image", "image"], ["video"], ["image", "video", "image"], ["video", "image", "video"]]


def shown(kinds: list[str], seed: int) -> list[np.ndarray | Clip]:
    """Pictures and clips of random sizes, lengths and speeds."""
    random = np.random.default_rng(seed)
    sizes = [tuple(random.integers(20, 200, 2)) for _ in kinds]
    return [
        drawn(seed, *size) if kind == "image" else Clip(drawn(seed, int(random.integers(2, 40)), *size), random.uniform(1, 30))
        for kind, size in zip(kinds, sizes, strict=True)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kinds", CASES, ids="-".join)
def test_a_sequence_with_pictures_equals_the_processors(
    processor: Any, prompter: Prompter, model: Qwen2_5_VLModel, kinds: list[str], seed: int
) -> None:
    media = shown(kinds, seed)
    images = [one for one in media if isinstance(one, np.ndarray)]
    clips = [one for one in media if isinstance(one, Clip)]
    prompt = "a red circle, 猫" * seed
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False) + "<|im_end|>"
    metadata = [VideoMetadata(total_num_frames=len(clip.frames), fps=clip.fps) for clip in clips]
    expected = processor(
        text=[text],
        images=[Image.fromarray(image) for image in images] or None,
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips] or None,
        videos_kwargs={"do_sample_frames": True, "fps": 2.0, "video_metadata": metadata, "return_metadata": True},
        return_tensors="pt",
    )
    seen = look_at(media, SPEC)
    found = prompter.encode([prompt], seen=seen)
    np.testing.assert_array_equal(found.input_ids, expected["input_ids"].numpy())
    positions, _ = model.get_rope_index(
        expected["input_ids"],
        mm_token_type_ids=expected["mm_token_type_ids"],
        image_grid_thw=expected.get("image_grid_thw"),
        video_grid_thw=expected.get("video_grid_thw"),
        second_per_grid_ts=expected.get("second_per_grid_ts"),
    )
    np.testing.assert_array_equal(found.position_ids, positions.numpy())
    assert found.starts[0] == positions[0, 0, -1] + 1, "the canvas follows the end token"
    order = {"image": iter([]), "video": iter([])}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if name in expected:
            counts = expected[f"{kind}_grid_thw"].prod(dim=1).tolist()
            order[kind] = iter(expected[name].split(counts))
    pixels = torch.cat([next(order[kind]) for kind in kinds]).numpy()
    inputs = tower_inputs(seen, SPEC)
    np.testing.assert_allclose(inputs["pixels"].reshape(pixels.shape), pixels, atol=2e-6)
    rows = found.vision_index[0]
    pads = np.isin(found.input_ids[0], [SPEC.image_token_id, SPEC.clip_token_id])
    np.testing.assert_array_equal(rows[pads], np.arange(len(inputs["pixels"])))
    assert (rows[~pads] == -1).all()


def test_texts_of_a_seeing_planner_count_up_and_pad_with_nothing(prompter: Prompter) -> None:
    encoded = prompter.encode(["a", "a longer one"])
    rows = np.arange(encoded.input_ids.shape[1]) * encoded.attention_mask
    np.testing.assert_array_equal(encoded.position_ids, np.tile(rows, (3, 1, 1)))
    np.testing.assert_array_equal(encoded.starts, encoded.lengths)
    assert (encoded.vision_index == -1).all()


def test_a_batch_gives_each_prompt_what_it_gets_alone(prompter: Prompter) -> None:
    seen = look_at(shown(["image", "video"], 5), SPEC)
    prompts = ["a", "a red circle left of a blue square"]
    both = prompter.encode(prompts, seen=seen)
    for row, prompt in enumerate(prompts):
        alone, length = prompter.encode([prompt], seen=seen), int(both.lengths[row])
        np.testing.assert_array_equal(both.input_ids[row, :length], alone.input_ids[0])
        np.testing.assert_array_equal(both.position_ids[:, row, :length], alone.position_ids[:, 0])
        np.testing.assert_array_equal(both.vision_index[row, :length], alone.vision_index[0])
        assert both.starts[row] == alone.starts[0]
        assert (both.position_ids[:, row, length:] == 0).all()
        assert (both.vision_index[row, length:] == -1).all()


def test_pictures_do_not_count_against_the_texts_limit(prompter: Prompter, tmp_path: Path) -> None:
    seen = look_at([drawn(0, 140, 140)] * 4, SPEC)
    assert sum(one.grid.tokens for one in seen) == 100
    length = int(prompter.encode(["a " * 40], seen=seen).lengths[0])
    assert length > prompter.spec.max_tokens
    with pytest.raises(RequestError, match="the limit is 128"):
        prompter.encode(["word " * 200], seen=seen)


def test_a_digest_tells_pictures_apart() -> None:
    one, same, other = (look_at([drawn(seed, 60, 60)], SPEC)[0].digest for seen, seed in enumerate((1, 1, 2)))
    assert one == same != other
    still = drawn(3, 56, 56)
    frame, moving = look_at([still, Clip(np.stack([still, still]), 2.0)], SPEC)
    assert frame.digest != moving.digest


@pytest.mark.parametrize(
    ("media", "reason"),
    [
        ([np.zeros((1, 201, 3), np.uint8)], "1x201 pixels is too narrow.*crop it"),
        ([np.zeros((4, 4), np.uint8)], r"\[height, width, 3\].*RGB"),
        ([np.zeros((4, 0, 3), np.uint8)], r"\[4, 0, 3\]"),
        ([np.full((4, 4, 3), np.nan, np.float32)], "finite floats"),
        ([np.zeros((4, 4, 3), np.int64)], "int64"),
        ([np.zeros((40, 40, 3), np.uint8)] * 5, "5 pictures and clips.*limit is 4; leave some out"),
        ([Clip(np.zeros((0, 4, 4, 3), np.uint8), 8.0)], "at least one frame"),
        ([Clip(np.zeros((3, 4, 4, 3), np.uint8), 0.0)], "frames a second"),
        ([Clip(np.zeros((3, 4, 4, 3), np.uint8), float("nan"))], "frames a second"),
        ([Clip([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], 2.0)], "one size"),
        ([Clip(np.zeros((20, 90, 90, 3), np.uint8), 2.0)] * 3, r"take \d+ tokens, the limit is 128; give fewer"),
    ],
)
def test_what_cannot_be_seen_is_refused(media: list[Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        look_at(media, SPEC)


def test_huge_pictures_are_refused_before_they_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_runtime.prompting.pixels.MAX_PIXELS", 99)
    with pytest.raises(RequestError, match="10x10 pixels, more than 99; resize it"):
        picture_frames(Image.new("RGB", (10, 10)), SPEC)


def test_pad_tokens_in_the_text_are_refused_beside_pictures(prompter: Prompter) -> None:
    seen = look_at([drawn(0, 60, 60)], SPEC)
    with pytest.raises(RequestError, match="take it out"):
        prompter.encode(["a <|image_pad|> of mine"], seen=seen)
    assert prompter.encode(["a <|image_pad|> of mine"]).lengths[0] > 0, "without pictures it is text like any other"


def test_a_bundle_that_reads_text_refuses_pictures(tmp_path: Path) -> None:
    blind = Prompter(planner_prompting(qwen_processor(), CONFIG, tmp_path), tmp_path)
    with pytest.raises(RequestError, match="reads text only"):
        blind.encode(["a"], seen=look_at([drawn(0, 60, 60)], SPEC))


def test_a_template_that_moves_its_pictures_is_refused(tmp_path: Path) -> None:
    processor = seeing_processor(SPEC)
    processor.chat_template = (
        "{% for c in messages[0]['content'] if c['type'] == 'image' %}<|image_pad|>{% endfor %}"
        "{% for c in messages[0]['content'] if c['type'] == 'video' %}<|video_pad|>{% endfor %}"
        "{{ messages[0]['content'][-1]['text'] }}"
    )
    spec = replace(SPEC, image_text="<|image_pad|>", clip_text="<|video_pad|>")
    with pytest.raises(CheckpointError, match="in order before the prompt"):
        planner_prompting(processor, CONFIG, tmp_path, vision=spec)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": 100}, "window"),
        ({"image_pixels": (5000, 4000)}, "image_pixels"),
        ({"clip_pixels": (10, 700)}, "clip_pixels"),
        ({"std": (0.1, 0.0, 0.1)}, "std"),
        ({"min_frames": 11}, "max_frames"),
        ({"clip_token_id": SPEC.image_token_id}, "two tokens"),
        ({"max_media": 0}, "max_media"),
        ({"clip_fps": 0.0}, "clip_fps"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(SPEC, **change)
