"""Positions against `get_rope_index` of transformers' Qwen2.5-VL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from mc_runtime.prompting import Grid, canvas_positions, sequence_positions

MERGE, TOKENS_PER_SECOND = 2, 4


@pytest.fixture(scope="module")
def model() -> Qwen2_5_VLModel:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32,
                       "spatial_merge_size": MERGE, "tokens_per_second": TOKENS_PER_SECOND},
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


def of_transformers(model: Qwen2_5_VLModel, parts: list[int | tuple[str, Grid]]) -> np.ndarray:
    """`[3, n]` for text runs and vision grids; a video's interval is given as seconds per grid."""
    types: list[int] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    seconds: list[float] = []
    for part in parts:
        if isinstance(part, int):
            types += [0] * part
            continue
        kind, grid = part
        types += [1 if kind == "image" else 2] * grid.tokens
        grids[kind].append([grid.t, grid.h * MERGE, grid.w * MERGE])
        if kind == "video":
            seconds.append(grid.interval / TOKENS_PER_SECOND)
    count = len(types)
    positions, _ = model.get_rope_index(
        torch.zeros(1, count, dtype=torch.long),
        mm_token_type_ids=torch.tensor([types], dtype=torch.int),
        image_grid_thw=torch.tensor(grids["image"]) if grids["image"] else None,
        video_grid_thw=torch.tensor(grids["video"]) if grids["video"] else None,
        second_per_grid_ts=torch.tensor(seconds) if seconds else None,
        attention_mask=torch.ones(1, count),
    )
    return positions[:, 0].numpy()


@pytest.mark.parametrize("length", [1, 23])
def test_text(model: Qwen2_5_VLModel, length: int) -> None:
    got, start = sequence_positions([length])
    assert got.shape == (3, length)
    assert got.dtype == np.int64
    assert start == length
    np.testing.assert_array_equal(got, of_transformers(model, [length]))


@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(1, 4, 4), Grid(1, 3, 7), Grid(1, 16, 16), Grid(1, 11, 5)])
@pytest.mark.parametrize("length", [1, 30])
def test_canvas_is_placed_like_an_image(model: Qwen2_5_VLModel, length: int, grid: Grid) -> None:
    got = canvas_positions([length], grid)
    assert got.shape == (3, 1, grid.t, grid.h, grid.w)
    np.testing.assert_array_equal(got.reshape(3, -1), of_transformers(model, [length, ("image", grid)])[:, length:])


@pytest.mark.parametrize("interval", [1.0, 2.0, 4 / 3, 0.3, 12.7])
def test_keyframes_are_placed_like_a_video(model: Qwen2_5_VLModel, interval: float) -> None:
    grid = Grid(3, 4, 5, interval=interval)
    got = canvas_positions([9], grid).reshape(3, -1)
    np.testing.assert_array_equal(got, of_transformers(model, [9, ("video", grid)])[:, 9:])


def test_a_batch_starts_each_canvas_after_its_own_text() -> None:
    grid = Grid(1, 2, 3)
    batch = canvas_positions([4, 9, 1], grid)
    assert batch.shape == (3, 3, 1, 2, 3)
    for row, start in enumerate([4, 9, 1]):
        np.testing.assert_array_equal(batch[:, row], grid.positions(start))
        assert batch[0, row].max() == start


def test_images_and_videos_between_text_and_the_canvas_after_them(model: Qwen2_5_VLModel) -> None:
    image, wide, video, canvas = Grid(1, 3, 2), Grid(1, 2, 9), Grid(4, 2, 2, interval=3.0), Grid(1, 4, 4)
    parts = [5, ("image", image), 2, ("video", video), 1, ("image", wide), 7, ("image", canvas)]
    expected = of_transformers(model, parts)
    got, start = sequence_positions([5, image, 2, video, 1, wide, 7])
    np.testing.assert_array_equal(got, expected[:, : got.shape[1]])
    np.testing.assert_array_equal(canvas_positions([start], canvas).reshape(3, -1), expected[:, got.shape[1] :])


def test_an_empty_sequence_has_no_positions() -> None:
    positions, start = sequence_positions([])
    assert positions.shape == (3, 0)
    assert start == 0
