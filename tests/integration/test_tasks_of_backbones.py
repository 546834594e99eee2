"""Every backbone, stock and MetaCanvas, in every task of its spec: the runtime around the engines' programs, in torch, makes
what the reference makes. (The same through exported engines: `test_matrix.py`.)

Two results at once, at two sizes that are odd in the cells that a backbone lets sizes have, with a canvas grid smaller than the
latents', guidance on and off, the projections that start at zero random. float32: final latents within 1e-4 of their range,
pictures within one level of 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mc_export.backbones.registry import BACKBONES
from mc_export.checkpoint import load_checkpoint
from mc_export.reference import ReferencePipeline
from mc_runtime import Runtime
from mc_runtime.errors import CheckpointError
from tests.program_bundle import programs_as_engines
from tests.tiny_backbones import KINDS, PROMPTS, TINY, cases, tiny_checkpoint, tiny_sizes
from tests.tiny_wan import tiny_metacanvas_wan

pytestmark = pytest.mark.integration

LATENTS, LEVELS = 1e-4, 1


PAIRS = [
    pytest.param((backbone, kind), id=f"{backbone.name}-{kind}", marks=[pytest.mark.matrix] if kind == "stock" else [])
    for backbone in BACKBONES
    for kind in KINDS
]
"""Stock ones are held to diffusers' pipelines elsewhere, and take their turn with the matrix."""


@pytest.fixture(scope="module", params=PAIRS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ReferencePipeline, Runtime]]:
    """The reference and the runtime of one checkpoint."""
    backbone, kind = request.param
    folder = tmp_path_factory.mktemp(f"{backbone.name}-{kind}")
    checkpoint = tiny_checkpoint(folder / "checkpoint", backbone, kind)
    with tiny_sizes(), programs_as_engines(folder / "cache") as build:
        yield ReferencePipeline.from_checkpoint(checkpoint), build(checkpoint, folder / "bundle")


def test_every_backbone_has_a_tiny_checkpoint() -> None:
    assert set(TINY) == {backbone.name for backbone in BACKBONES}


def test_a_bundle_makes_what_the_reference_makes(pair: tuple[ReferencePipeline, Runtime]) -> None:
    reference, runtime = pair
    seen = []
    for case in cases(reference.checkpoint):
        arguments = case.arguments(reference.checkpoint)
        expected, result = (one.generate(PROMPTS, **arguments) for one in (reference, runtime))
        error, spread = np.abs(result.latents - expected.latents), np.ptp(expected.latents)
        assert error.max() <= LATENTS * spread, f"{case}: max {error.max():.1e}, mean {error.mean():.1e}, range {spread:.2f}"
        if expected.clips:
            ours, theirs = np.stack([clip.frames for clip in result.clips]), np.stack(expected.clips) * 255
        else:
            ours, theirs = (np.stack([np.asarray(image) for image in one.images]) for one in (result, expected))
        assert ours.shape == theirs.shape
        assert np.abs(ours.astype(float) - theirs).max() <= LEVELS, case
        assert np.ptp(ours) > 0, "a picture of one colour shows nothing"
        seen.append(case.task)
    assert set(seen) == set(runtime.manifest.tasks)
    if runtime.manifest.canvas is not None:
        without = reference.generate(PROMPTS, **{**arguments, "canvas": False, "output": "latents"}).latents
        assert np.abs(without - expected.latents).max() > 10 * LATENTS * spread, "the canvas reaches it"


def test_a_task_that_no_backbone_does_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tasks: video-editing needs a model of 9 input channels; this one has 4"):
        load_checkpoint(tiny_metacanvas_wan(tmp_path / "narrow", clips=False, tasks=("video-editing",)))
    with pytest.raises(CheckpointError, match="wan cannot do image-editing; it can do text-to-video"):
        load_checkpoint(tiny_metacanvas_wan(tmp_path / "pictures", tasks=("image-editing",)))
