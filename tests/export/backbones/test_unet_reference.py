"""MetaCanvas checkpoints of UNets: the reference pipeline against their planner and step programs, in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_export.build.options import BuildOptions
from mc_export.build.parts import Limits, parts_of
from mc_export.checkpoint import load_checkpoint
from mc_export.reference import ReferencePipeline
from mc_export.reference.prompts import encode_for_planner
from tests.export.backbones.drive import Told, assert_same_latents, denoise, schedule_of
from tests.factories_unet import tiny_metacanvas_animatediff, tiny_metacanvas_sdxl

STEPS, SCALE, SIZE = 3, 4.0, (24, 40)
LIMITS = Limits(
    max_batch=4, max_tokens=16, max_canvas=8, planner_length=64, text_lengths=(), context_length=64, order=1, max_frames=8
)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "frames", "conditions"),
    [
        (tiny_metacanvas_sdxl, None, {"size_ids": torch.tensor([[24.0, 40, 0, 0, 24, 40]]).repeat(2, 1)}),
        (tiny_metacanvas_animatediff, 4, {}),
    ],
    ids=["sdxl", "animatediff"],
)
def test_the_reference_equals_the_programs(make: Any, frames: int | None, conditions: dict, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(make(tmp_path / "checkpoint", seed=5))
    reference = ReferencePipeline(checkpoint)
    prompts, negative = ["a red circle", "two green triangles above a yellow square"], "blue"
    shape = (4, *([frames] if frames else []), *(side // 2 for side in SIZE))
    noise = np.random.default_rng(2).standard_normal((2, *shape)).astype(np.float32)
    asked = {"steps": STEPS, "guidance_scale": SCALE, "size": SIZE, "frames": frames, "latents": noise, "output": "latents"}
    expected = reference.generate(prompts, negative_prompt=negative, **asked).latents
    assert not np.allclose(expected, reference.generate(prompts, negative_prompt=negative, canvas=False, **asked).latents)

    config = checkpoint.config
    assert config is not None
    parts = {part.component: part.make().eval() for part in parts_of(checkpoint, LIMITS, BuildOptions())}
    told, canvases = [], []
    for texts in (prompts, [negative] * 2):
        feed = encode_for_planner(reference.planner_tokenizer, config, texts, config.canvas.grid_at(*SIZE))
        plan = parts["planner"].run({name: tensor.contiguous() for name, tensor in feed.items()})
        told.append(Told(plan["context"], feed["attention_mask"], plan.get("pooled")))
        canvases.append(plan["canvas"])
    schedule = schedule_of(checkpoint.backbone, checkpoint.load_model(), checkpoint.load_scheduler(), STEPS)
    actual = denoise(
        parts["step"], schedule, torch.from_numpy(noise), told, [SCALE, 1 - SCALE],
        conditions={**conditions, "canvas": torch.stack(canvases, dim=1)},
    )  # fmt: skip
    assert_same_latents(actual, torch.from_numpy(expected))
