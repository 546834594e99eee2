"""Resizing: the same numbers as diffusers' processors, at odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media import Clip, fit, fit_clip
from mc_runtime.media.fit import FitMode

SIZES = [(32, 48), (64, 16), (8, 8), (104, 56)]
MODES: list[tuple[FitMode, str]] = [("stretch", "default"), ("crop", "crop")]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(("mode", "theirs"), MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", [(33, 47), (32, 48), (7, 201), (1, 3000)])
def test_equals_the_image_processor(size: tuple[int, int], given: tuple[int, int], mode: FitMode, theirs: str) -> None:
    from diffusers.image_processor import VaeImageProcessor

    images = [picture(*given, seed=seed) for seed in range(2)]
    expected = VaeImageProcessor(do_normalize=False).preprocess(images, *size, resize_mode=theirs)
    found = fit(images, size, mode)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.permute(0, 2, 3, 1).numpy())
    normalized = VaeImageProcessor().preprocess(images[1], *size, resize_mode=theirs)
    np.testing.assert_array_equal(2 * fit(images[1], size, mode) - 1, normalized.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("count", "given", "size"), [(1, (20, 30), (32, 48)), (5, (64, 33), (16, 24)), (3, (40, 40), (40, 40))]
)
def test_equals_the_video_processor(count: int, given: tuple[int, int], size: tuple[int, int]) -> None:
    from diffusers.video_processor import VideoProcessor

    clip = Clip.of_images([picture(*given, seed=seed) for seed in range(count)], 8)
    expected = VideoProcessor().preprocess_video(clip.images, *size)
    np.testing.assert_array_equal(2 * fit_clip(clip, size) - 1, expected.permute(0, 2, 3, 4, 1).numpy())


def test_a_picture_of_one_row() -> None:
    row = Image.new("RGB", (100_000, 1), (255, 0, 51))
    found = fit(row, (16, 24))
    assert found.shape == (1, 16, 24, 3)
    np.testing.assert_allclose(found, np.broadcast_to(np.float32([1, 0, 0.2]), found.shape), atol=1e-6)
    with pytest.raises(RequestError, match="100000x1 pixels is too narrow to crop to 1280x704"):
        fit(row, (704, 1280), "crop")


def test_what_cannot_be_fitted() -> None:
    for images, size, mode, says in [
        ([], (8, 8), "stretch", "no image"), (picture(4, 4), (0, 8), "stretch", "at least 1x1"),
        (picture(4, 4).convert("L"), (8, 8), "stretch", "got L"), (picture(4, 4), (8, 8), "fill", "'stretch' or 'crop'"),
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=says):
            fit(images, size, mode)  # type: ignore[arg-type]
