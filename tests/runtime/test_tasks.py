"""Tasks: which one a request is, what each takes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mc_runtime import RequestError
from mc_runtime.bundle.manifest import Frames, Guidance, Latents, Manifest
from mc_runtime.bundle.store import open_bundle
from mc_runtime.tasks.registry import TASKS, default_request, request_for
from tests.runtime.fake_bundle import write_fake_bundle

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 30, 3), np.uint8))
CLIP = np.random.default_rng(4).integers(0, 255, (11, 16, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return open_bundle(write_fake_bundle(tmp_path_factory.mktemp("fake"))).manifest


def able(manifest: Manifest, *tasks: str, **changes: Any) -> Manifest:
    """The manifest of a bundle that makes videos of 1 + 4 k frames, 4 to a latent frame."""
    video = {
        "frames": Frames(default=9, multiple=4, first=1, max=17, fps=8),
        "latents": Latents(channels=4, scale=8, patch=1, frames=4),
    }
    return replace(manifest, tasks=tasks, **{**video, **changes})


@pytest.mark.parametrize(
    ("tasks", "given", "guessed"),
    [
        (("text-to-image",), {}, "text-to-image"),
        (("text-to-image", "image-editing"), {"image": PICTURE}, "image-editing"),
        (("image-editing", "text-to-image"), {}, "text-to-image"),
        (("text-to-video", "image-to-video", "in-context-video"), {"image": PICTURE}, "image-to-video"),
        (("text-to-video", "image-to-video", "in-context-video"), {"image": [PICTURE, PICTURE]}, "in-context-video"),
        (("text-to-video", "video-editing"), {"video": CLIP, "fps": 8.0}, "video-editing"),
        (("in-context-video",), {"image": PICTURE}, "in-context-video"),
    ],
)
def test_the_inputs_speak_for_a_task(manifest: Manifest, tasks: tuple[str, ...], given: dict[str, Any], guessed: str) -> None:
    request = request_for(able(manifest, *tasks), prompt="a", **given)
    assert type(request) is TASKS[guessed]
    assert request.task == guessed


def test_a_task_that_is_named_is_taken(manifest: Manifest) -> None:
    both = able(manifest, "image-to-video", "in-context-video")
    assert request_for(both, "in-context-video", prompt="a", image=PICTURE).pictures == (PICTURE,)


@pytest.mark.parametrize(
    ("tasks", "given", "says"),
    [
        (("text-to-image",), {"image": PICTURE}, "can do text-to-image"),
        (("image-editing",), {}, "needs image"),
        (("text-to-image",), {"task": "image-editing", "image": PICTURE}, "cannot do image-editing; it can do text-to-image"),
        (("text-to-image",), {"task": "painting"}, "unknown; this bundle can do text-to-image"),
        (("text-to-image",), {"frames": 5}, "takes no frames"),
        (("image-editing",), {"image": [PICTURE, PICTURE]}, "takes one image, got 2"),
        (("image-editing",), {"task": "image-editing"}, "needs an image"),
        (("in-context-video",), {"image": []}, "1 to 16 images, got 0"),
        (("text-to-video",), {"frames": 7}, "nearest is 5 or 9"),
        (("text-to-video",), {"frames": 21}, "nearest is 17"),
        (("text-to-video",), {"frames": 2.5}, "frames must be a whole number"),
        (("text-to-video",), {"fps": 0}, "fps must be a number"),
        (("text-to-video",), {"fps": float("nan")}, "fps must be a number"),
        (("text-to-video",), {"strength": 0.5}, "takes no strength"),
        (("image-to-video",), {"image": PICTURE, "motion_bucket": 256}, "motion_bucket must be"),
        (("video-editing",), {"video": CLIP, "fps": 24.0, "frames": 13}, "has 11 frames at 24 a second"),
    ],
)
def test_what_cannot_be_served_is_said_with_what_can(
    manifest: Manifest, tasks: tuple[str, ...], given: dict[str, Any], says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        request_for(able(manifest, *tasks), **{"prompt": "a", **given})


def test_a_bundle_of_pictures_makes_no_videos(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="no videos"):
        request_for(replace(manifest, tasks=("text-to-video",)), prompt="a")


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5)])
def test_latents_of_a_video(manifest: Manifest, frames: int, latent_frames: int) -> None:
    request = request_for(able(manifest, "text-to-video"), prompt=["a", "b"], frames=frames, size=(32, 48))
    assert request.latent_shape == (4, latent_frames, 4, 6)
    noise = np.zeros((2, 4, latent_frames, 4, 6))
    assert request_for(able(manifest, "text-to-video"), prompt=["a", "b"], frames=frames, size=(32, 48), latents=noise)


def test_a_clip_gives_the_frames_that_are_served(manifest: Manifest) -> None:
    request = request_for(able(manifest, "video-editing"), prompt="a", video=CLIP, fps=8.0)
    assert request.clip is not None
    assert (request.frames, len(request.clip)) == (9, 9)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(request.clip.frames, CLIP[:9])


def test_guidance_can_rise_over_the_frames(manifest: Manifest) -> None:
    ramped = able(manifest, "text-to-video", guidance=Guidance(default=3.0, branches=2, ramp_from=1.0))
    weights = request_for(ramped, prompt="a", frames=9).branch_weights
    np.testing.assert_allclose(weights, [[1, 2, 3], [0, -1, -2]])
    assert request_for(ramped, prompt="a", frames=9, guidance_scale=1.0).branch_weights.tolist() == [[1, 1, 1]]


def test_a_scale_that_the_model_is_told_makes_no_branch(manifest: Manifest) -> None:
    embedded = able(manifest, "text-to-image", guidance=Guidance(default=2.5, branches=1, embedded=True))
    request = request_for(embedded, prompt="a", guidance_scale=7.0)
    assert request.guidance_scale == 7
    assert request.branch_weights.tolist() == [1]
    assert not request.uses_guidance
    with pytest.raises(RequestError, match="takes no negative prompt"):
        request_for(embedded, prompt="a", negative_prompt="blurry")


def test_a_negative_prompt_with_a_scale_of_its_own(manifest: Manifest) -> None:
    both = able(manifest, "text-to-image", guidance=Guidance(default=2.5, branches=1, embedded=True, true_cfg=True))
    assert request_for(both, prompt="a", guidance_scale=7.0).branch_weights.tolist() == [1]
    request = request_for(both, prompt="a", guidance_scale=7.0, true_cfg_scale=3.0, negative_prompt="blurry")
    assert request.branch_weights.tolist() == [3, -2]
    assert request.guidance_scale == 7
    with pytest.raises(RequestError, match="give true_cfg_scale above 1, too"):
        request_for(both, prompt="a", negative_prompt="blurry")
    with pytest.raises(RequestError, match="true_cfg_scale must be a number"):
        request_for(both, prompt="a", true_cfg_scale=float("nan"))
    with pytest.raises(RequestError, match="leave true_cfg_scale out"):
        request_for(able(manifest, "text-to-image"), prompt="a", true_cfg_scale=3.0)


def test_default_request_is_of_a_task_that_needs_no_input(manifest: Manifest, tmp_path: Path) -> None:
    assert default_request(able(manifest, "image-editing"), prompt="") is None
    request = default_request(able(manifest, "image-editing", "text-to-image"), prompt="")
    assert request is not None
    assert request.task == "text-to-image"
