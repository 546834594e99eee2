"""Pictures and clips to pixels, against transformers' own processors; what cannot be seen is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from mc_runtime.errors import RequestError
from mc_runtime.media.clip import Clip
from mc_runtime.prompting import look_at
from mc_runtime.prompting.pixels import clip_frames, patches, picture_frames, resized_size, sampled_frames
from tests.tiny_processors import TINY_VISION as SPEC
from tests.tiny_processors import VideoProcessor, drawn, seeing_processor


@pytest.fixture(scope="module")
def processor() -> Any:
    return seeing_processor(SPEC)


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
        ([Clip(np.zeros((3, 1, 300, 3), np.uint8), 8.0)], "1x300 pixels is too narrow"),
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
