"""Comparisons, sheets that move, canvas maps of several keyframes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mc_runtime.media import Clip, canvas_map, clip_sheet, comparison, contact_sheet, load_clip, save_clip
from mc_runtime.media.canvas_map import GAP as MAP_GAP
from mc_runtime.media.comparison import GAP, HOLD, SWEEP


def clip(count: int, colour: int, fps: float = 8, size: tuple[int, int] = (12, 16)) -> Clip:
    levels = (colour + np.arange(count)).astype(np.uint8)
    return Clip(np.broadcast_to(levels[:, None, None, None], (count, *size, 3)).copy(), fps)


def test_two_pictures_side_by_side_and_swept() -> None:
    before, after = Image.new("RGB", (16, 12), (200, 0, 0)), Image.new("RGB", (32, 24), (0, 0, 200))
    shown = comparison(before, after)
    assert shown.size == (24, 32 + GAP + 32)
    assert len(shown) == HOLD + (SWEEP - 1) + 2 * HOLD + (SWEEP - 1)
    assert (shown.frames[:, :, :32] == (200, 0, 0)).all(), "the input stays on the left"
    right = shown.frames[:, :, 32 + GAP :]
    assert (right[0] == (200, 0, 0)).all()
    assert (right[HOLD + SWEEP] == (0, 0, 200)).all()
    share = (right == (0, 0, 200)).all(axis=3).mean(axis=(1, 2))
    assert (np.diff(share[: HOLD + SWEEP]) >= 0).all()
    assert (np.diff(share[-SWEEP:]) <= 0).all()


@pytest.mark.parametrize(("counts", "rates"), [((4, 6), (8, 8)), ((6, 4), (8, 8)), ((8, 4), (16, 8)), ((3, 9), (4, 12))])
def test_two_clips_run_together(counts: tuple[int, int], rates: tuple[float, float]) -> None:
    before, after = clip(counts[0], 0, rates[0]), clip(counts[1], 100, rates[1])
    shown = comparison(before, after)
    assert shown.fps == after.fps
    assert len(shown) == max(counts[1], round(counts[0] * rates[1] / rates[0]))
    for index, frame in enumerate(shown.frames):
        assert frame[0, 0, 0] == min(int(index * rates[0] / rates[1]), counts[0] - 1)
        assert frame[0, -1, 0] == 100 + min(index, counts[1] - 1)


def test_a_picture_beside_the_clip_made_of_it() -> None:
    shown = comparison(Image.new("RGB", (16, 12), (7, 7, 7)), clip(5, 100))
    assert len(shown) == 5
    assert (shown.frames[:, :, :16] == 7).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_a_comparison_is_saved_as_any_clip(tmp_path: Path, suffix: str) -> None:
    shown = comparison(Image.new("RGB", (16, 12)), Image.new("RGB", (16, 12), (0, 0, 200)))
    save_clip(shown, tmp_path / f"edit{suffix}")
    assert len(load_clip(tmp_path / f"edit{suffix}", fps=shown.fps)) == len(shown)


def test_every_moment_of_a_moving_sheet_is_a_contact_sheet() -> None:
    clips = [clip(3, 0), clip(5, 50), clip(1, 100)]
    sheet = clip_sheet(clips, ["a", "b", "c"])
    assert len(sheet) == 5
    for index, frame in enumerate(sheet.images):
        images = [each.images[min(index, len(each) - 1)] for each in clips]
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(contact_sheet(images, ["a", "b", "c"])))
    for bad in ([], [clip(2, 0), clip(2, 0, fps=9)]):
        with pytest.raises(ValueError, match=r"clip"):
            clip_sheet(bad)


def test_one_pca_over_all_keyframes() -> None:
    """The same token has the same colour in every keyframe, which a PCA a keyframe would not give."""
    canvas = np.random.default_rng(0).standard_normal((3, 4, 5, 16)).astype(np.float32)
    canvas[1:] *= 3
    canvas[1, 2, 3] = canvas[2, 0, 1] = canvas[0, 1, 1]
    shown = np.asarray(canvas_map(canvas, (4, 5)))
    frames = [shown[:, t * (5 + MAP_GAP) :][:, :5] for t in range(3)]
    assert shown.shape == (4, 3 * 5 + 2 * MAP_GAP, 3)
    np.testing.assert_array_equal(frames[1][2, 3], frames[0][1, 1])
    np.testing.assert_array_equal(frames[2][0, 1], frames[0][1, 1])
