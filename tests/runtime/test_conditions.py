"""What the step engine is told beside the prompt, source by source."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mc_runtime import RequestError
from mc_runtime.bundle.manifest import ConditionSource, Frames, Latents, Manifest
from mc_runtime.bundle.store import open_bundle
from mc_runtime.runtime.conditions import _FILLERS, Told
from mc_runtime.runtime.encoding import reference_size
from mc_runtime.runtime.plan import Branch
from mc_runtime.tasks.registry import request_for
from tests.runtime.fake_bundle import write_fake_bundle

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 30, 3), np.uint8))
CLIP = np.random.default_rng(4).integers(0, 255, (9, 32, 32, 3), np.uint8)
VIDEO_TASKS = ("text-to-video", "image-to-video", "in-context-video", "video-editing")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    found = open_bundle(write_fake_bundle(tmp_path_factory.mktemp("fake"))).manifest
    return replace(
        found,
        tasks=("text-to-image", "image-editing", *VIDEO_TASKS),
        frames=Frames(default=9, multiple=4, first=1, max=17, fps=8),
        latents=Latents(channels=4, scale=8, patch=1, frames=4),
        reference_sizes=((16, 48), (32, 32), (48, 16)),
    )


def encode(pixels: np.ndarray) -> np.ndarray:
    """The mean over every cell of 8 x 8 pixels, in 4 equal channels; a clip's every fourth frame, a picture as one frame."""
    cells = pixels.reshape(*pixels.shape[:-3], pixels.shape[-3] // 8, 8, pixels.shape[-2] // 8, 8, 3).mean((-4, -2, -1))
    return np.stack([cells[::4] if pixels.ndim == 4 else cells] * 4)


def filled(manifest: Manifest, source: ConditionSource, seeds: tuple[int, ...] = (3, 4), **arguments: Any) -> np.ndarray:
    """The array of one source, for two results."""
    request = request_for(manifest, **{"prompt": "a", **arguments})
    branch = Branch(np.zeros((1, 3), np.float32), np.ones(1, np.int64), None, np.arange(5, dtype=np.float32))
    return _FILLERS[source](Told(manifest, request, [[branch]] * len(seeds), seeds, encode))


def test_numbers_of_the_request(manifest: Manifest) -> None:
    image = {"task": "text-to-image", "size": (32, 64)}
    assert filled(manifest, "size_ids", **image).tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert filled(manifest, "guidance_scale", guidance_scale=3.5, **image).tolist() == [3.5, 3.5]
    assert filled(manifest, "pooled", **image).shape == (2, 1, 5)
    moving = {"task": "image-to-video", "image": PICTURE, "fps": 9, "motion_bucket": 90, "noise_augmentation": 0.5}
    assert filled(manifest, "motion_ids", **moving).tolist() == [[8, 90, 0.5]] * 2


@pytest.mark.parametrize("source", ["motion_ids", "image_latents"])
def test_a_task_without_what_the_model_needs_is_refused(manifest: Manifest, source: ConditionSource) -> None:
    with pytest.raises(RequestError, match="ask for image-to-video"):
        filled(manifest, source, task="text-to-video")


def test_a_reference_takes_the_size_nearest_to_its_proportions(manifest: Manifest) -> None:
    assert reference_size(manifest, Image.new("RGB", (300, 100))) == (16, 48)
    assert reference_size(manifest, Image.new("RGB", (90, 100))) == (32, 32)
    edit = {"task": "image-editing", "image": Image.new("RGB", (100, 300))}
    assert filled(manifest, "reference_latents", **edit).shape == (2, 4, 6, 2)
    assert filled(manifest, "has_reference", **edit).tolist() == [1, 1]
    without = filled(manifest, "reference_latents", task="text-to-image")
    assert without.shape == (2, 4, 1, 1)
    assert not without.any()
    assert filled(manifest, "has_reference", task="text-to-image").tolist() == [0, 0]


def test_noise_on_the_picture_is_of_every_results_seed(manifest: Manifest) -> None:
    moving = {"task": "image-to-video", "image": PICTURE, "size": (32, 32)}
    clean = filled(manifest, "image_latents", noise_augmentation=0.0, **moving)
    noisy = filled(manifest, "image_latents", noise_augmentation=0.5, **moving)
    assert clean.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(clean[0], clean[1])
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3
    again = filled(manifest, "image_latents", (4,), noise_augmentation=0.5, **moving)
    np.testing.assert_array_equal(again[0], noisy[1])


def test_first_frames_clips_and_references_of_a_video(manifest: Manifest) -> None:
    size = {"size": (32, 48), "frames": 9}
    first = filled(manifest, "first_frame", task="image-to-video", image=PICTURE, **size)
    assert first.shape == (2, 4, 1, 4, 6)
    assert first.any()
    assert filled(manifest, "has_first_frame", task="image-to-video", image=PICTURE, **size).tolist() == [1, 1]
    assert not filled(manifest, "first_frame", task="text-to-video", **size).any()
    assert filled(manifest, "has_first_frame", task="text-to-video", **size).tolist() == [0, 0]
    edit = {"task": "video-editing", "video": CLIP, "fps": 8.0, "size": (32, 48)}
    assert filled(manifest, "condition_latents", **edit).shape == (2, 4, 3, 4, 6)
    assert filled(manifest, "condition_mask", **edit).tolist() == np.ones((2, 1, 3, 4, 6)).tolist()
    assert not filled(manifest, "condition_latents", task="text-to-video", **size).any()
    assert not filled(manifest, "condition_mask", task="text-to-video", **size).any()
    shown = {"task": "in-context-video", "image": [PICTURE, PICTURE.rotate(90)], **size}
    assert filled(manifest, "reference_frames", **shown).shape == (2, 4, 2, 4, 6)
    assert filled(manifest, "reference_mask", **shown).tolist() == [[1, 1]] * 2
    assert filled(manifest, "reference_frames", task="text-to-video", **size).shape == (2, 4, 1, 4, 6)
    assert filled(manifest, "reference_mask", task="text-to-video", **size).tolist() == [[0]] * 2
