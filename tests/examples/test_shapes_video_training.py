"""Training reads and tells exactly what the reference, and so the runtime, reads and tells."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from examples.shapes.processor import train_tokenizer
from examples.shapes.video import models
from examples.shapes.video.cases import sample_cases
from examples.shapes.video.reading import Reader
from examples.shapes.video.train import save
from examples.shapes.video.train_painter import Painter, tell
from examples.shapes.video.train_planner import film_labels, seen_labels
from examples.shapes.video.world import FPS
from mc_export.model.canvas_connector import randomize_projections
from mc_export.model.planner import PlannerStates
from mc_export.reference import ReferencePipeline
from mc_export.reference.media import MediaEncoder, given_media
from mc_export.reference.told import Asked, latent_extents, told_by_request
from mc_runtime.media.clip import Clip

SIZE = (64, 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint of the demo's configuration, its connectors on."""
    folder = tmp_path_factory.mktemp("video") / "checkpoint"
    tokenizer = train_tokenizer(case.prompt for case in sample_cases(200, False, random.Random(0)))
    torch.manual_seed(0)
    canvas = models.build_canvas()
    randomize_projections(canvas.canvas_connector, 1)
    autoencoder = models.build_autoencoder()
    autoencoder.register_to_config(latents_mean=[0.1] * 16, latents_std=[0.5] * 16)
    planner, backbone = models.build_planner(tokenizer), models.build_backbone()
    save(folder, tokenizer, {"planner": planner, "canvas": canvas, "transformer": backbone, "vae": autoencoder})
    return folder


@torch.no_grad()
def test_training_is_told_what_the_reference_is_told(checkpoint: Path, tmp_path: Path) -> None:
    cases = sample_cases(8, True, random.Random(4))
    reference = ReferencePipeline.from_checkpoint(checkpoint)
    assert reference.planner is not None
    assert reference.canvas is not None
    told = tell(reference.planner, reference.vae, Reader(checkpoint, tmp_path), cases)
    painter = Painter(reference.checkpoint.load_model(), reference.canvas).eval()
    context, canvas = painter.prepare(PlannerStates(told.context, told.canvas))
    encoder = MediaEncoder(reference.checkpoint, reference.vae, torch.float32)
    for row, case in enumerate(cases):
        media = {"image": case.picture, "video": None if case.clip is None else Clip(case.clip, FPS)}
        given = given_media(reference.checkpoint, case.task, **{name: one for name, one in media.items() if one is not None})
        expected = reference.conditions([case.prompt], SIZE, media=given.media)
        length = expected.context.shape[1]
        assert int(told.mask[row].sum()) == length
        assert expected.canvas is not None
        torch.testing.assert_close(context[row, :length], expected.context[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(canvas[row], expected.canvas[0], atol=2e-5, rtol=1e-4)
        asked = Asked(reference.checkpoint, latent_extents(reference.checkpoint, SIZE, 9), 1.0, [0], given, encoder)
        conditions = told_by_request(asked, 1)
        assert set(conditions) == set(told.conditions)
        for name, tensor in told.conditions.items():
            torch.testing.assert_close(tensor[row : row + 1], conditions[name], atol=2e-5, rtol=1e-4, msg=f"{case.task} {name}")


def test_labels_say_where_the_target_and_what_is_seen_are() -> None:
    for case in sample_cases(8, True, random.Random(6)):
        labels = film_labels(case)
        assert labels.shape == (3 * models.GRID**2, 32)
        first, last = ({int(label) for label in labels[keyframe * 16 : (keyframe + 1) * 16].flat} for keyframe in (0, 2))
        assert first == last
        assert len(first) == 1 + len(case.target.actors)
        if case.task != "text-to-video":
            assert seen_labels(case).shape == (16 if case.source is None else 32, 32)
