"""What a backbone's step is told beside prompt and canvas: a request's numbers, and zeros for pictures it does not have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mc_export.checkpoint.load import Checkpoint

# Stable Video Diffusion's own defaults.
_MOTION_BUCKET, _NOISE_AUGMENTATION = 127.0, 0.02


def latent_extents(checkpoint: Checkpoint, size: tuple[int, int], frames: int | None = None) -> dict[str, int]:
    """Sizes of the latents' axes for (height, width) in pixels and, for a video, its pixel frames."""
    scale, backbone = checkpoint.pixels_per_latent, checkpoint.backbone
    extents = {"H": size[0] // scale, "W": size[1] // scale}
    default = backbone.video_frames(checkpoint.model_config)
    if default is not None:
        extents["T"] = checkpoint.strides.latent_frames(frames or default)
    return extents


def told_by_request(
    checkpoint: Checkpoint,
    extents: Mapping[str, int],
    *,
    count: int,
    branches: int,
    scale: float,
    given: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """All conditions but pooled vectors, ``[count, *shape]``, or ``[count, branches, *shape]`` where every branch has its own.

    Args:
        checkpoint: an opened checkpoint.
        extents: of the latents, see :func:`latent_extents`.
        count: results.
        branches: of guidance.
        scale: of guidance.
        given: conditions by name; the others are the request's numbers, or zeros.
    """
    given = given or {}
    backbone, config, pixels = checkpoint.backbone, checkpoint.model_config, checkpoint.pixels_per_latent
    sizes = {axis.name: axis.min for axis in backbone.condition_axes(config, 64)} | dict(extents)
    height, width = extents["H"] * pixels, extents["W"] * pixels
    numbers: dict[str, object] = {
        "guidance_scale": scale,
        "size_ids": [height, width, 0, 0, height, width],
        "motion_ids": [backbone.default_fps - 1, _MOTION_BUCKET, _NOISE_AUGMENTATION],
    }
    told: dict[str, Tensor] = {}
    for condition in backbone.conditions(config):
        leading = (count, branches) if condition.per_branch else (count,)
        shape = tuple(sizes[extent] if isinstance(extent, str) else extent for extent in condition.shape)
        if condition.name in given:
            told[condition.name] = torch.from_numpy(given[condition.name])
        elif condition.source in numbers:
            told[condition.name] = torch.tensor(numbers[condition.source], dtype=torch.float32).expand(*leading, *shape)
        elif condition.source != "pooled":
            told[condition.name] = torch.zeros(*leading, *shape)
    return told
