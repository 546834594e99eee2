"""What the manifest says of pictures comes from the checkpoint's processor, planner and chat template, which must agree."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mc_export.build.options import BuildOptions
from mc_export.build.parts import Limits, parts_of
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.vision import planner_vision
from mc_runtime.errors import CheckpointError, RequestError
from mc_runtime.prompting import look_at
from tests.factories import tiny_metacanvas_checkpoint
from tests.tiny_processors import drawn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("eyes") / "checkpoint"
    return load_checkpoint(tiny_metacanvas_checkpoint(folder, seed=22, tasks=("image-editing",)))


def test_limits_are_the_processors_where_the_checkpoint_names_none(checkpoint: Checkpoint) -> None:
    spec = planner_vision(checkpoint)
    assert spec is not None
    assert spec.image_pixels == (56 * 56, 28 * 28 * 1280)
    assert spec.clip_pixels == spec.image_pixels, "without a file of its own, a video processor takes the picture's"
    file = checkpoint.path / "processor" / "video_preprocessor_config.json"
    file.write_text(json.dumps({"size": {"shortest_edge": 3136, "longest_edge": 78400}}), encoding="utf-8")
    spec = planner_vision(checkpoint)
    file.unlink()
    assert spec is not None
    assert spec.clip_pixels == (3136, 78400)


@pytest.mark.parametrize("tokens", [1, 64, 144])
def test_a_number_of_tokens_for_every_picture(checkpoint: Checkpoint, tokens: int) -> None:
    """Exactly that for a square; nearly for other shapes (paper, Table 16: 144)."""
    spec = planner_vision(checkpoint)
    assert spec is not None
    spec = replace(spec, image_pixels=(tokens * 784, tokens * 784), max_tokens=1000)
    for side in (30, 333, 1024):
        assert look_at([drawn(0, side, side)], spec)[0].grid.tokens == tokens
    wide = look_at([drawn(0, 200, 300)], spec)[0].grid.tokens
    assert tokens == 1 or 0.75 * tokens <= wide <= 1.25 * tokens


def test_a_planner_of_text_has_no_eyes(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=2))
    assert planner_vision(checkpoint) is None
    limits = Limits(
        max_batch=2, max_tokens=16, max_canvas=8, planner_length=64, text_lengths=(), context_length=64, order=1
    )
    parts = {part.component: part for part in parts_of(checkpoint, limits, BuildOptions())}
    assert "vision" not in parts
    assert [spec.name for spec in parts["planner"].make().inputs] == [
        "input_ids", "attention_mask", "position_ids", "canvas_position_ids",
    ]  # fmt: skip
    with pytest.raises(RequestError, match="no such engine"):
        parts_of(checkpoint, limits, BuildOptions(engines={"vision": BuildOptions().choice("vision")}))


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("processor/preprocessor_config.json", "patch_size", 16, "patch_size is 16, this planner needs 14"),
        ("processor/preprocessor_config.json", "resample", 2, "resample is 2"),
        ("processor/preprocessor_config.json", "do_normalize", False, "do_normalize is False"),
        ("processor/preprocessor_config.json", "image_std", [0, 1, 1], "std"),
        ("planner/config.json", "video_token_id", 6, "once for each video"),
    ],
)
def test_a_processor_of_another_kind_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, file: str, key: str, value: Any, reason: str
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.path, copy)
    settings = json.loads((copy / file).read_text(encoding="utf-8"))
    settings[key] = value
    (copy / file).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match=reason):
        planner_vision(load_checkpoint(copy))
