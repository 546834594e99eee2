"""The canvas as a picture."""

from __future__ import annotations

import numpy as np
import pytest

from mc_runtime.errors import EngineError
from mc_runtime.media import canvas_map
from mc_runtime.media.canvas_map import GAP, principal_colours


def random_canvas(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def regions() -> np.ndarray:
    """`[1, 8, 8, 32]`: four quadrants, each with a direction of its own, and a little noise."""
    directions = random_canvas(4, 32)
    quadrant = (np.arange(8)[:, None] >= 4) * 2 + (np.arange(8)[None] >= 4)
    return (directions[quadrant] + 0.01 * random_canvas(8, 8, 32, seed=1))[None]


def test_regions_of_a_layout_have_their_own_colours() -> None:
    colours = principal_colours(regions())[0]
    quadrants = [colours[:4, :4], colours[:4, 4:], colours[4:, :4], colours[4:, 4:]]
    means = [quadrant.mean(axis=(0, 1)) for quadrant in quadrants]
    assert max(quadrant.std(axis=(0, 1)).max() for quadrant in quadrants) < 0.02
    assert min(np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]) > 0.3


def test_colours_do_not_depend_on_sign_scale_or_offset() -> None:
    canvas = regions()
    expected = principal_colours(canvas)
    np.testing.assert_allclose(principal_colours(canvas * 1000), expected, atol=1e-4)
    np.testing.assert_allclose(principal_colours(canvas * 1e-20), expected, atol=1e-4)
    np.testing.assert_allclose(principal_colours(canvas + 5), expected, atol=1e-3)
    np.testing.assert_array_equal(principal_colours(canvas.copy()), expected)


def test_one_wild_token_does_not_darken_the_rest() -> None:
    canvas = random_canvas(1, 16, 16, 8)
    canvas[0, 0, 0] *= 100
    colours = principal_colours(canvas)[0].reshape(-1, 3)[1:]
    assert (colours.std(axis=0) > 0.1).all()


@pytest.mark.parametrize("value", [0.0, 3.5, -1e30])
@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (3, 1, 1, 2), (1, 1, 1, 1)])
def test_a_flat_canvas_is_grey(value: float, shape: tuple[int, ...]) -> None:
    picture = np.asarray(canvas_map(np.full(shape, value, np.float32), size=(8, 8)))
    inside = picture[:, :8]
    assert (inside == 128).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 2, 1, 16), (2, 3, 5, 1), (1, 3, 3, 2)])
def test_few_tokens_or_few_channels_leave_components_grey(shape: tuple[int, ...]) -> None:
    colours = principal_colours(random_canvas(*shape))
    assert colours.shape == (*shape[:3], 3)
    assert np.isfinite(colours).all()
    rank = min(int(np.prod(shape[:3])) - 1, shape[3])
    assert [bool((colours[..., i] != 0.5).any()) for i in range(3)] == [i < rank for i in range(3)]


def test_tokens_are_rectangles_and_keyframes_lie_side_by_side() -> None:
    canvas = random_canvas(3, 2, 4, 16)
    picture = np.asarray(canvas_map(canvas, size=(20, 40)))
    assert picture.shape == (20, 3 * 40 + 2 * GAP, 3)
    colours = np.rint(principal_colours(canvas) * 255)
    for t in range(3):
        frame = picture[:, t * (40 + GAP) : t * (40 + GAP) + 40]
        np.testing.assert_array_equal(frame, colours[t].repeat(10, axis=0).repeat(10, axis=1))
    assert (picture[:, 40 : 40 + GAP] == 255).all()


@pytest.mark.parametrize(("grid", "size"), [((16, 16), (512, 512)), ((11, 20), (512, 282)), ((1, 1), (512, 512))])
def test_without_a_size_the_longer_side_is_512(grid: tuple[int, int], size: tuple[int, int]) -> None:
    assert canvas_map(random_canvas(1, *grid, 8)).size == size


def test_a_canvas_that_is_not_finite_is_an_engine_error() -> None:
    canvas = random_canvas(1, 2, 2, 4)
    canvas[0, 1, 1, 2] = np.nan
    with pytest.raises(EngineError, match="not finite"):
        canvas_map(canvas)
