"""What the step engine is told beside the prompt: numbers of the request, and the latents of its pictures.

`manifest.conditions` names the step's further inputs and where each comes from; every source has one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mc_runtime.backends.base import Array
from mc_runtime.bundle.manifest import ConditionSource, Manifest
from mc_runtime.errors import RequestError
from mc_runtime.runtime.batch import guidance_dimension
from mc_runtime.runtime.encoding import Encoding, reference_size
from mc_runtime.runtime.engines import Engines
from mc_runtime.runtime.plan import Branch
from mc_runtime.runtime.work import Work
from mc_runtime.sampling.noise import further_noise
from mc_runtime.tasks.image_to_video import ImageToVideo
from mc_runtime.tasks.in_context_video import InContextVideo
from mc_runtime.tasks.request import Request

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Told:
    """What the conditions of one batch are made of.

    Attributes:
        manifest: of the bundle.
        request: the whole request.
        branches: for every result of the batch, as many branches as guidance uses.
        seeds: of the batch's results.
        encode: pixels of a picture `[h, w, 3]` or a clip `[F, h, w, 3]` to latents, once for each content.
    """

    manifest: Manifest
    request: Request
    branches: Sequence[Sequence[Branch]]
    seeds: Sequence[int]
    encode: Callable[[Array], Array]

    def each(self, value: object) -> Array:
        """The same for every result."""
        return np.stack([np.asarray(value, np.float32)] * len(self.seeds))


class Conditions:
    """Fills the conditions of a bundle's step engine."""

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self._manifest = manifest
        self._encoding = Encoding(manifest, engines)

    def of_batch(
        self, request: Request, branches: Sequence[Sequence[Branch]], seeds: Sequence[int], work: Work
    ) -> dict[str, Array]:
        """Named arrays `[results, ...]`, or `[results, branches, ...]` where every branch has its own."""
        told = Told(self._manifest, request, branches, seeds, self._encoding.encoder(work))
        step = self._manifest.engines["step"]
        filled = {}
        for name, source in self._manifest.conditions.items():
            array = _FILLERS[source](told)
            tensor = step.input(name)
            of_branches = tensor is not None and tensor.shape[1:2] == guidance_dimension(step)
            if of_branches and source != "pooled":
                # An input picture speaks for the prompt's branch; what guidance leads away from has none.
                none = np.zeros_like(array)
                array = np.stack([array, *[none] * (len(branches[0]) - 1)], axis=1)
            filled[name] = array
        return filled

    def shapes(self, request: Request) -> dict[str, tuple[int, ...]]:
        """Per result, the shapes of those whose size is not the latents'; known before any engine runs."""
        found: dict[str, tuple[int, ...]] = {}
        for name, source in self._manifest.conditions.items():
            if source == "reference_latents":
                found[name] = _reference_shape(self._manifest, request)
            if source in ("reference_frames", "reference_mask"):
                slots = max(1, len(_references(request)))
                channels, _, height, width = request.latent_shape
                found[name] = (slots,) if source == "reference_mask" else (channels, slots, height, width)
        return found

    def forget(self) -> None:
        """Empty the cache of encoded pictures and clips."""
        self._encoding.forget()

    @property
    def components(self) -> tuple[str, ...]:
        """The engines they need."""
        return self._encoding.components if self._manifest.encodes_media else ()


def _pooled(told: Told) -> Array:
    pooled = [[branch.pooled for branch in result if branch.pooled is not None] for result in told.branches]
    return np.stack([np.stack(of_result) for of_result in pooled])


def _guidance_scale(told: Told) -> Array:
    return told.each(told.request.guidance_scale)


def _size_ids(told: Told) -> Array:
    """(height, width) of the original, top and left of its crop, (height, width) of the target, as SDXL counts them."""
    height, width = told.request.size
    return told.each([height, width, 0, 0, height, width])


def _motion_ids(told: Told) -> Array:
    """Frames a second less one, motion bucket, noise augmentation, as Stable Video Diffusion counts them."""
    request = told.request
    if not isinstance(request, ImageToVideo):
        raise RequestError(f"{request.task} says nothing of motion, which this bundle's model is told; ask for image-to-video")
    return told.each([request.fps - 1, request.motion_bucket, request.noise_augmentation])


def _image_latents(told: Told) -> Array:
    """The picture at the request's size, with noise of every result's own seed where the request adds any."""
    from mc_runtime.media.fit import fit

    request = told.request
    if not request.pictures:
        raise RequestError(f"{request.task} gives no picture, which this bundle's model needs; ask for image-to-video")
    pixels = fit(request.pictures[0], request.size)[0]
    strength = request.noise_augmentation if isinstance(request, ImageToVideo) else 0.0
    if strength == 0:
        return told.each(told.encode(pixels))
    # Pixels from 0 to 1 are half as far apart as the model's, from -1 to 1.
    noise = (further_noise(seed, pixels.shape) for seed in told.seeds)
    return np.stack([told.encode(pixels + np.float32(strength / 2) * drawn) for drawn in noise])


def _reference_latents(told: Told) -> Array:
    """The picture to edit, at the served size nearest to its proportions; zeros of the smallest size without one."""
    from mc_runtime.media.fit import fit

    pictures = told.request.pictures
    if not pictures:
        return told.each(np.zeros(_reference_shape(told.manifest, told.request)))
    return told.each(told.encode(fit(pictures[0], reference_size(told.manifest, pictures[0]))[0]))


def _reference_shape(manifest: Manifest, request: Request) -> tuple[int, ...]:
    channels, patch, scale = manifest.latents.channels, manifest.latents.patch, manifest.latents.scale
    if not request.pictures:
        return channels, patch, patch
    height, width = reference_size(manifest, request.pictures[0])
    return channels, height // scale, width // scale


def _has_reference(told: Told) -> Array:
    return told.each(1.0 if told.request.pictures else 0.0)


def _first_frame(told: Told) -> Array:
    """The picture's latents as one frame `[C, 1, H, W]`; zeros where the task has none."""
    from mc_runtime.media.fit import fit

    request = told.request
    if not isinstance(request, ImageToVideo):
        channels, _, height, width = request.latent_shape
        return told.each(np.zeros((channels, 1, height, width)))
    return told.each(told.encode(fit(request.pictures[0], request.size)))


def _has_first_frame(told: Told) -> Array:
    return told.each(1.0 if isinstance(told.request, ImageToVideo) else 0.0)


def _condition_latents(told: Told) -> Array:
    """The clip to edit `[C, T, H, W]`; zeros where the task has none."""
    from mc_runtime.media.fit import fit_clip

    request = told.request
    if request.clip is None:
        return told.each(np.zeros(request.latent_shape))
    return told.each(told.encode(fit_clip(request.clip, request.size)[0]))


def _condition_mask(told: Told) -> Array:
    """1 where a clip is given, `[1, T, H, W]`."""
    _, *extents = told.request.latent_shape
    return told.each(np.full((1, *extents), 0.0 if told.request.clip is None else 1.0))


def _reference_frames(told: Told) -> Array:
    """Every reference picture as one frame `[C, R, H, W]`; one slot of zeros where there is none."""
    from mc_runtime.media.fit import fit

    references = _references(told.request)
    if not references:
        channels, _, height, width = told.request.latent_shape
        return told.each(np.zeros((channels, 1, height, width)))
    return told.each(np.concatenate([told.encode(fit(one, told.request.size)) for one in references], axis=1))


def _reference_mask(told: Told) -> Array:
    """1 for every reference `[R]`, 0 for the empty slot."""
    return told.each(np.ones(len(_references(told.request)) or 1) * bool(_references(told.request)))


def _references(request: Request) -> tuple[Image.Image, ...]:
    return request.pictures if isinstance(request, InContextVideo) else ()


_FILLERS: Mapping[ConditionSource, Callable[[Told], Array]] = {
    "pooled": _pooled,
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
