"""A tiny random checkpoint of every backbone, stock and MetaCanvas, and requests for it: what generated tests are made of.

A backbone that is added to the registry needs an entry in `TINY`; everything else follows from its spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from PIL import Image

from mc_export.backbones.base import Backbone
from mc_export.backbones.registry import BACKBONES
from mc_export.checkpoint import Checkpoint
from mc_runtime.sampling.noise import initial_noise
from mc_runtime.tasks.registry import TASKS
from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana
from tests.factories_unet import (
    tiny_metacanvas_animatediff,
    tiny_metacanvas_sdxl,
    tiny_metacanvas_svd,
    tiny_stock_animatediff,
    tiny_stock_sdxl,
    tiny_stock_svd,
)
from tests.tiny_flux import small_pictures_to_edit, tiny_metacanvas_flux, tiny_stock_flux
from tests.tiny_wan import tiny_metacanvas_wan, tiny_stock_wan

STEPS = 3
SEED = 61
KINDS = ("metacanvas", "stock")
# Few tokens a picture, so that a planner with eyes is as quick as one without.
EYES = {"image_tokens": 4, "frame_tokens": 4, "max_vision_tokens": 64, "max_tokens": 64}


class Tiny(NamedTuple):
    """What makes a backbone's checkpoints: both are given a folder and a seed, the one with a canvas its settings too."""

    metacanvas: Callable[..., Path]
    stock: Callable[..., Path]


TINY: dict[str, Tiny] = {
    "sana": Tiny(partial(tiny_metacanvas_checkpoint, layers=1), partial(tiny_stock_sana, layers=1)),
    "flux": Tiny(
        partial(tiny_metacanvas_flux, kind="flux"), partial(tiny_stock_flux, kind="flux", num_layers=1, num_single_layers=1)
    ),
    "flux-kontext": Tiny(tiny_metacanvas_flux, partial(tiny_stock_flux, num_layers=1, num_single_layers=1)),
    "wan": Tiny(tiny_metacanvas_wan, partial(tiny_stock_wan, image_to_video=True)),
    "sdxl": Tiny(tiny_metacanvas_sdxl, tiny_stock_sdxl),
    "animatediff": Tiny(tiny_metacanvas_animatediff, tiny_stock_animatediff),
    "svd": Tiny(tiny_metacanvas_svd, tiny_stock_svd),
}


def tiny_checkpoint(folder: Path, backbone: Backbone, kind: str) -> Path:
    """The backbone's checkpoint of a kind, a MetaCanvas one with all its tasks."""
    if kind == "stock":
        return TINY[backbone.name].stock(folder, seed=SEED)
    return TINY[backbone.name].metacanvas(folder, seed=SEED, tasks=backbone.canvas_tasks, prompt=EYES)


@contextmanager
def tiny_sizes() -> Iterator[None]:
    """Where a stock model's configuration names no size, its own is a tiny one while this lasts, not the published.

    Requests that say no size are of it, calibration's too: with thousands of tokens it takes minutes and tells no more.
    """
    with ExitStack() as stack:
        stack.enter_context(small_pictures_to_edit())
        for backbone in BACKBONES:
            if not backbone.config_names_size:
                stack.enter_context(patch.object(type(backbone), "default_latent_size", lambda *_: (8, 12)))
        yield


@dataclass(frozen=True)
class Case:
    """A request for two results at once.

    Attributes:
        task: one of the checkpoint's.
        size: (height, width) in pixels: odd multiples of what the backbone lets sizes be.
        latent_frames: of a video.
        scale: of guidance; at 1 it is off where it weighs branches.
    """

    task: str
    size: tuple[int, int]
    latent_frames: int
    scale: float

    def arguments(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Of `Runtime.generate` and `ReferencePipeline.generate`, with the same noise."""
        backbone, config = checkpoint.backbone, checkpoint.model_config
        frames = checkpoint.strides.frames(self.latent_frames) if backbone.video_frames(config) else None
        extents = {axis: side // checkpoint.pixels_per_latent for axis, side in zip("HW", self.size, strict=True)}
        extents["T"] = self.latent_frames
        shape = (backbone.latent_channels(config), *(extents[axis] for axis in backbone.latent_axes))
        arguments: dict[str, Any] = {
            "task": self.task, "size": self.size, "steps": STEPS, "guidance_scale": self.scale,
            "latents": np.stack([initial_noise(seed, shape) for seed in (5, 6)]), "seed": [5, 6],
        }  # fmt: skip
        if backbone.guidance_branches > 1 and self.scale > 1:
            arguments["negative_prompt"] = "blurry"
            if backbone.embeds_guidance:
                arguments["true_cfg_scale"] = 2.5
        return arguments | _media(self.task, frames)


def cases(checkpoint: Checkpoint) -> Iterator[Case]:
    """Every task, guided, at one size and length; the last one unguided at another, too."""
    multiple = checkpoint.pixels_per_latent * checkpoint.backbone.size_multiple(checkpoint.model_config)
    tasks = checkpoint.config.tasks if checkpoint.config else checkpoint.backbone.tasks
    for task in tasks:
        yield Case(task, (3 * multiple, 5 * multiple), 3, 4.3)  # a scale that bf16 cannot hold
    yield Case(tasks[-1], (5 * multiple, 3 * multiple), 2, 1.0)


PROMPTS = ["a red circle", "two green triangles above a yellow square"]
_PICTURE = np.random.default_rng(2).integers(0, 255, (6, 9, 3), np.uint8)


def _media(task: str, frames: int | None) -> dict[str, Any]:
    """A smooth picture that is not of the size asked for, two of them as references; a clip of as many frames as asked for."""
    picture = Image.fromarray(_PICTURE).resize((90, 50), Image.Resampling.BICUBIC)
    media: dict[str, Any] = {} if frames is None else {"frames": frames}
    needed = TASKS[task].media
    if "image" in needed:
        media["image"] = [picture, picture.rotate(180)] if task == "in-context-video" else picture
    if "video" in needed:
        assert frames is not None
        media["video"] = np.stack([np.roll(np.asarray(picture), 3 * index, axis=1) for index in range(frames)])
    return media


def backbone_named(name: str) -> Backbone:
    """From the registry."""
    return next(backbone for backbone in BACKBONES if backbone.name == name)
