"""What a backbone's step is told beside prompt and canvas: a request's numbers and pictures, zeros where it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mc_export.backbones.spec import Condition
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.reference.media import Given, MediaEncoder
from mc_runtime.bundle.manifest import ConditionSource
from mc_runtime.sampling.noise import further_noise


def latent_extents(checkpoint: Checkpoint, size: tuple[int, int], frames: int | None = None) -> dict[str, int]:
    """Sizes of the latents' axes for (height, width) in pixels and, for a video, its pixel frames."""
    scale = checkpoint.pixels_per_latent
    extents = {"H": size[0] // scale, "W": size[1] // scale}
    default = checkpoint.defaults.frames
    if default is not None:
        extents["T"] = checkpoint.strides.latent_frames(frames or default)
    return extents


@dataclass(frozen=True)
class Asked:
    """What conditions are made of.

    Attributes:
        checkpoint: an opened checkpoint.
        extents: of the latents, see :func:`latent_extents`.
        scale: of guidance.
        seeds: one a result.
        given: pictures, clip and numbers.
        encoder: of pictures and clips; needed only where some are given.
    """

    checkpoint: Checkpoint
    extents: Mapping[str, int]
    scale: float
    seeds: Sequence[int]
    given: Given = field(default_factory=Given)
    encoder: MediaEncoder | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        cell = self.checkpoint.pixels_per_latent
        return self.extents["H"] * cell, self.extents["W"] * cell

    @property
    def encode(self) -> MediaEncoder:
        """The encoder."""
        assert self.encoder is not None, "pictures and clips come with an encoder"
        return self.encoder


def told_by_request(asked: Asked, branches: int, given: Mapping[str, np.ndarray] | None = None) -> dict[str, Tensor]:
    """All conditions but pooled vectors.

    They are ``[results, *shape]``, or ``[results, branches, *shape]`` where every branch has its own.
    ``given`` are conditions by name, in place of what the request says.
    """
    backbone, config = asked.checkpoint.backbone, asked.checkpoint.model_config
    sizes = {axis.name: axis.min for axis in backbone.condition_axes(config, 64)} | dict(asked.extents)
    told: dict[str, Tensor] = {}
    for condition in backbone.conditions(config):
        if condition.name in (given or {}):
            told[condition.name] = torch.from_numpy((given or {})[condition.name])
        elif condition.source != "pooled":
            told[condition.name] = _filled(condition, asked, sizes, branches)
    return told


def _filled(condition: Condition, asked: Asked, sizes: Mapping[str, int], branches: int) -> Tensor:
    """One condition; a picture speaks for the prompt's branch alone, as in diffusers' pipelines."""
    value = _SOURCES[condition.source](asked)
    if value is None:
        shape = tuple(sizes[extent] if isinstance(extent, str) else extent for extent in condition.shape)
        value = torch.zeros(len(asked.seeds), *shape)
    if not condition.per_branch:
        return value
    return torch.stack([value, *[torch.zeros_like(value)] * (branches - 1)], dim=1)


def _each(asked: Asked, value: Tensor | float | Sequence[float]) -> Tensor:
    """The same for every result."""
    tensor = torch.as_tensor(value, dtype=torch.float32)
    return tensor.expand(len(asked.seeds), *tensor.shape)


def _guidance_scale(asked: Asked) -> Tensor:
    return _each(asked, asked.scale)


def _size_ids(asked: Asked) -> Tensor:
    height, width = asked.size
    return _each(asked, [height, width, 0, 0, height, width])


def _motion_ids(asked: Asked) -> Tensor:
    given = asked.given
    fps = given.fps or asked.checkpoint.defaults.fps
    return _each(asked, [fps - 1, given.motion_bucket, given.noise_augmentation])


def _image_latents(asked: Asked) -> Tensor | None:
    """The picture with noise of every result's own seed, drawn pixel by pixel `[h, w, 3]`."""
    if not asked.given.pictures:
        return None
    picture, strength = asked.given.pictures[0], asked.given.noise_augmentation
    drawn = (torch.from_numpy(further_noise(seed, (*asked.size, 3))).movedim(-1, 0) for seed in asked.seeds)
    return torch.stack([asked.encode.picture(picture, asked.size, strength * noise) for noise in drawn])


def _reference_latents(asked: Asked) -> Tensor | None:
    """The picture to edit, at the backbone's own size that is nearest to its proportions (`FluxKontextPipeline`'s rule)."""
    if not asked.given.pictures:
        return None
    picture, sizes = asked.given.pictures[0], asked.checkpoint.reference_sizes
    proportion = picture.width / picture.height
    _, width, height = min((abs(proportion - width / height), width, height) for height, width in sizes)
    return _each(asked, asked.encode.picture(picture, (height, width)))


def _has_reference(asked: Asked) -> Tensor:
    return _each(asked, float(bool(asked.given.pictures)))


def _first_frame(asked: Asked) -> Tensor | None:
    frame = asked.given.first_frame
    return None if frame is None else _each(asked, asked.encode.clip([frame], asked.size))


def _has_first_frame(asked: Asked) -> Tensor:
    return _each(asked, float(asked.given.first_frame is not None))


def _condition_latents(asked: Asked) -> Tensor | None:
    clip = asked.given.clip
    return None if clip is None else _each(asked, asked.encode.clip(clip.images, asked.size))


def _condition_mask(asked: Asked) -> Tensor | None:
    if asked.given.clip is None:
        return None
    return _each(asked, torch.ones(1, *(asked.extents[axis] for axis in asked.checkpoint.backbone.latent_axes)))


def _reference_frames(asked: Asked) -> Tensor | None:
    """Each as a clip of one frame, one behind the other."""
    references = asked.given.references
    frames = [asked.encode.clip([picture], asked.size) for picture in references]
    return _each(asked, torch.cat(frames, dim=1)) if frames else None


def _reference_mask(asked: Asked) -> Tensor | None:
    return _each(asked, torch.ones(len(asked.given.references))) if asked.given.references else None


_SOURCES: Mapping[ConditionSource, Callable[[Asked], Tensor | None]] = {
    "guidance_scale": _guidance_scale,
    "size_ids": _size_ids,
    "motion_ids": _motion_ids,
    "image_latents": _image_latents,
    "reference_latents": _reference_latents,
    "has_reference": _has_reference,
    "first_frame": _first_frame,
    "has_first_frame": _has_first_frame,
    "condition_latents": _condition_latents,
    "condition_mask": _condition_mask,
    "reference_frames": _reference_frames,
    "reference_mask": _reference_mask,
}
