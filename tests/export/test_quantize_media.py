"""What engines that are told of pictures and clips are calibrated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_export.checkpoint import load_checkpoint
from mc_export.quantize.calibration import calibration_inputs
from mc_export.quantize.media import PICTURES, calibration_media, calibration_picture, calibration_poster
from mc_export.quantize.policy import split
from tests.factories_unet import tiny_metacanvas_svd, tiny_stock_svd
from tests.tiny_flux import tiny_metacanvas_flux
from tests.tiny_wan import tiny_metacanvas_wan


@pytest.mark.parametrize("size", [(32, 48), (50, 21)])
def test_pictures_use_every_level_and_are_smooth(size: tuple[int, int]) -> None:
    picture = calibration_picture(size, seed=3)
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8
    assert (picture.min(axis=(0, 1)) == 0).all()
    assert (picture.max(axis=(0, 1)) == 255).all()
    steps = np.abs(np.diff(picture.astype(float), axis=0)).mean()
    assert steps < 0.5 * np.abs(picture.astype(float) - picture.mean()).mean()
    assert (calibration_picture(size, seed=3) == picture).all()
    assert (calibration_picture(size, seed=4) != picture).any()


def test_posters_are_flat_with_hard_edges() -> None:
    poster = calibration_poster((50, 64), seed=2)
    assert poster.shape == (50, 64, 3)
    assert len(np.unique(poster.reshape(-1, 3), axis=0)) > 3
    assert set(np.unique(poster)) <= {0, 128, 255}
    assert (np.diff(poster.astype(int), axis=1) == 0).all(axis=-1).mean() > 0.8
    assert (calibration_poster((50, 64), seed=2) == poster).all()
    assert (calibration_poster((50, 64), seed=3) != poster).any()


def test_requests_are_calibrated_with_both_kinds_of_pictures(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "flux", seed=5))
    edits = [feed["reference"] for feed in calibration_inputs(checkpoint, "step") if feed["has_reference"][0] == 1]
    assert len({reference.tobytes() for reference in edits}) == len(PICTURES)
    seen = calibration_inputs(checkpoint, "vision")
    assert len({feed["pixels"].tobytes() for feed in seen}) == len(seen)


def test_every_task_gives_its_own_media(tmp_path: Path) -> None:
    tasks = ("text-to-video", "image-to-video", "video-editing", "in-context-video")
    checkpoint = load_checkpoint(tiny_metacanvas_wan(tmp_path / "wan", tasks=tasks))
    given = {one.task: one for one in calibration_media(checkpoint, 5, seed=0)}
    assert next(reversed(given)) == "text-to-video", "a single request is to give as much as any does"
    assert given["text-to-video"].media == ()
    assert given["image-to-video"].first_frame is not None
    assert len(given["in-context-video"].references) == 1
    clip = given["video-editing"].clip
    assert clip is not None
    assert clip.frames.shape == (5, *checkpoint.default_size, 3)
    assert (clip.frames[1] != clip.frames[0]).any()


def test_an_edit_is_calibrated_with_and_without_its_reference(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "flux", seed=5))
    steps = calibration_inputs(checkpoint, "step")
    edits = [feed for feed in steps if feed["has_reference"][0] == 1]
    assert 0 < len(edits) < len(steps)
    assert any(feed["has_reference"][0] == 1 for feed in split(steps, "step").held_out)
    for feed in edits:
        assert feed["reference"].shape[2:] == feed["sample"].shape[2:]
        assert np.abs(feed["reference"]).max() > 0.1


@pytest.mark.parametrize("make", [tiny_metacanvas_svd, tiny_stock_svd])
def test_a_video_of_a_picture_is_calibrated_with_one(tmp_path: Path, make) -> None:
    checkpoint = load_checkpoint(make(tmp_path / "svd", seed=5))
    feed = calibration_inputs(checkpoint, "step")[0]
    np.testing.assert_allclose(feed["guidance"][0].sum(axis=0), 1)  # a weight for every frame, rising from the first one on
    assert feed["guidance"].shape == (1, 2, feed["sample"].shape[2])
    assert (np.diff(feed["guidance"][0, 0]) > 0).all()
    prompted, negative = feed["image_latents"][0]
    assert np.abs(prompted).max() > 0.1
    assert (negative == 0).all()
    assert np.abs(feed["context"]).max() > 0
    if checkpoint.is_stock:
        pixels = calibration_inputs(checkpoint, "image_encoder")[0]["pixels"]
        assert pixels.shape == (1, *checkpoint.default_size, 3)
        assert 0 <= pixels.min() < pixels.max() <= 1
