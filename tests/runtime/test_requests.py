"""What cannot be served is refused before any engine runs, in one line that says what can be."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mc_runtime import RequestError, TextToImage
from mc_runtime.bundle.manifest import Guidance, Manifest, Sizes
from mc_runtime.bundle.store import open_bundle
from tests.runtime.fake_bundle import CHANNELS, write_fake_bundle

# Python refuses to write it out, and so does pytest for the name of a test.
ENDLESS_NUMBER = 10**5000
ENDLESS = pytest.param(ENDLESS_NUMBER, id="endless")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return open_bundle(write_fake_bundle(tmp_path_factory.mktemp("requests") / "bundle")).manifest


def refused(manifest: Manifest, **arguments: Any) -> str:
    with pytest.raises(RequestError) as caught:
        TextToImage.from_arguments(manifest, **{"prompt": "a red circle", **arguments})
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_defaults_come_from_the_manifest(manifest: Manifest) -> None:
    request = TextToImage.from_arguments(manifest, prompt="a")
    assert (request.prompts, request.negative_prompts, request.seeds) == (("a",), ("",), (0,))
    assert (request.steps, request.guidance_scale, request.size) == (4, 2.5, (32, 32))
    assert request.latents is None
    assert request.uses_guidance


def test_seeds_count_up_over_prompts_and_images(manifest: Manifest) -> None:
    request = TextToImage.from_arguments(manifest, prompt=["a", "red"], num_images=2, seed=7)
    assert request.seeds == (7, 8, 9, 10)
    assert TextToImage.from_arguments(manifest, prompt=["a", "red"], seed=[5, 5]).seeds == (5, 5)
    assert TextToImage.from_arguments(manifest, prompt="a", seed=np.int64(3)).seeds == (3,)
    assert TextToImage.from_arguments(manifest, prompt="a", seed=np.array(3)).seeds == (3,)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_guidance_of_one_and_below_is_off(manifest: Manifest, scale: float) -> None:
    assert not TextToImage.from_arguments(manifest, prompt="a", guidance_scale=scale).uses_guidance


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((0, 32), "the nearest is 16x32"),
        ((-8, 32), "the nearest is 16x32"),
        ((32, 100_000), "the nearest is 32x128"),
        ((30, 33), "the nearest is 24x32 or 32x40"),
        ((8, 8), "the nearest is 16x16"),
        ((32,), "(height, width)"),
        ((32, 32.0), "(height, width)"),
        ((True, 32), "(height, width)"),
        ("32x32", "(height, width)"),
        pytest.param((ENDLESS_NUMBER, 32), "size (int too long to show)x32 is not served", id="endless"),
        ((-(10**50), 32), "the nearest is 16x32"),
        (np.array([32, 32]), "(height, width)"),
        (32, "(height, width)"),
    ],
)
def test_sizes(manifest: Manifest, size: Any, expected: str) -> None:
    assert expected in refused(manifest, size=size)


def test_sizes_of_engines_with_fixed_shapes(manifest: Manifest) -> None:
    sizes = Sizes(default=(32, 32), served=((32, 32), (64, 32)), multiple=8, min=16, max=128)
    fixed = replace(manifest, sizes=sizes)
    assert TextToImage.from_arguments(fixed, prompt="a", size=(64, 32)).size == (64, 32)
    message = refused(fixed, size=(72, 40))
    assert "built for 32x32 or 64x32" in message
    assert "the nearest is 64x32" in message


def test_range_whose_ends_are_no_multiples(manifest: Manifest) -> None:
    odd = replace(manifest, sizes=Sizes(default=(32, 32), multiple=8, min=10, max=100))
    assert "the nearest is 16x96" in refused(odd, size=(1, 1000))


@pytest.mark.parametrize("steps", [0, -1, 11, 2.0, True, "4", ENDLESS])
def test_steps(manifest: Manifest, steps: Any) -> None:
    assert "steps must be a whole number from 1 to 10" in refused(manifest, steps=steps)


@pytest.mark.parametrize("scale", [10**400, ENDLESS, 1e39, -1, math.nan, math.inf, "2", True, [2.0]])
def test_guidance(manifest: Manifest, scale: Any) -> None:
    assert "guidance_scale must be" in refused(manifest, guidance_scale=scale)


def test_guidance_for_a_model_without(manifest: Manifest) -> None:
    without = replace(manifest, guidance=Guidance(default=1.0, branches=1))
    assert "takes no guidance" in refused(without, guidance_scale=3)
    assert not TextToImage.from_arguments(without, prompt="a").uses_guidance


@pytest.mark.parametrize("seed", [-1, 2**63, ENDLESS, 1.5, "0", None, True, [0, 1], [], {0}, np.zeros((1, 99)), 1j])
def test_seeds(manifest: Manifest, seed: Any) -> None:
    assert "seed" in refused(manifest, seed=seed)


def test_last_seed_must_exist_too(manifest: Manifest) -> None:
    TextToImage.from_arguments(manifest, prompt="a", seed=2**63 - 1)
    assert "no room for 2 images" in refused(manifest, seed=2**63 - 1, num_images=2)


@pytest.mark.parametrize("images", [0, -1, 10**9, 1.0, True])
def test_num_images(manifest: Manifest, images: Any) -> None:
    assert "num_images must be a whole number from 1" in refused(manifest, num_images=images)


@pytest.mark.parametrize("prompt", [None, 3, b"a", ["a", 3], []])
def test_prompts(manifest: Manifest, prompt: Any) -> None:
    assert "prompt" in refused(manifest, prompt=prompt)


def test_negative_prompts_match_the_prompts(manifest: Manifest) -> None:
    assert "3 negative prompts for 2 prompts" in refused(manifest, prompt=["a", "b"], negative_prompt=["x"] * 3)
    request = TextToImage.from_arguments(manifest, prompt=["a", "b"], negative_prompt=["x", "y"])
    assert request.negative_prompts == ("x", "y")


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        (np.zeros((1, CHANNELS, 5, 4)), "[1, 4, 4, 4] for this request, got [1, 4, 5, 4]"),
        (np.zeros((2, CHANNELS, 4, 4)), "got [2, 4, 4, 4]"),
        (np.full((CHANNELS, 4, 4), np.nan), "NaN"),
        (np.full((CHANNELS, 4, 4), np.inf), "infinite"),
        ("noise", "real numbers, got <U5 numbers in a str"),
        ([[1], [1, 2]], "array of numbers"),
        (np.ones((CHANNELS, 4, 4), complex), "real numbers, got complex128"),
        (np.ones((CHANNELS, 4, 4), "datetime64[s]"), "real numbers, got datetime64[s]"),
        (np.ones((CHANNELS, 4, 4), bool), "real numbers, got bool"),
        (np.full((CHANNELS, 4, 4), 1, object), "real numbers, got object"),
        ({"a": 1}, "real numbers, got object numbers in a dict"),
    ],
)
def test_latents(manifest: Manifest, latents: Any, expected: str) -> None:
    assert expected in refused(manifest, latents=latents)


def test_latents_are_copied_as_float32(manifest: Manifest) -> None:
    given = np.ones((CHANNELS, 4, 4))
    request = TextToImage.from_arguments(manifest, prompt="a", latents=given)
    given[:] = 0
    assert request.latents is not None
    assert request.latents.dtype == np.float32
    assert request.latents.shape == (1, CHANNELS, 4, 4)
    assert request.latents.min() == 1


def test_output(manifest: Manifest) -> None:
    for output in ("video", None, np.array(["images", "latents"]), "i" * 10**6):
        message = refused(manifest, output=output)
        assert "'images' or 'latents'" in message
        assert len(message) < 200


def test_request_error_is_a_value_error() -> None:
    assert issubclass(RequestError, ValueError)
