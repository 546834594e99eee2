"""Pictures and clips to indices, ids and positions, against transformers' own processor, tower and model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.video_utils import VideoMetadata
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mc_export.model.config import CanvasConfig, MetaCanvasConfig, PromptConfig
from mc_export.prompting import planner_prompting
from mc_runtime.errors import CheckpointError, RequestError
from mc_runtime.media.clip import Clip
from mc_runtime.prompting import Grid, Prompter, look_at, tower_inputs
from mc_runtime.prompting.vision import tower_indices
from tests.tiny_processors import TINY_VISION as SPEC
from tests.tiny_processors import drawn, seeing_processor
from tests.tiny_tokenizers import qwen_processor

CONFIG = MetaCanvasConfig(canvas=CanvasConfig(grid=(1, 4, 4), pixels_per_token=8), prompt=PromptConfig(max_tokens=128))


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
