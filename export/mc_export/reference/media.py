"""Pictures and clips of a request as the reference takes them: opened, brought to size and encoded by diffusers' own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_runtime.media.clip import Clip
from mc_runtime.media.clip_input import load_clip
from mc_runtime.media.image_input import load_image
from mc_runtime.tasks.registry import task_for


@dataclass(frozen=True)
class Given:
    """What a request gives beside its prompts.

    Attributes:
        task: one of the checkpoint's; None where nothing but conditions is asked for.
        pictures: RGB.
        clip: at `fps`, as long as the result.
        frames: pixel frames of the result; None for the backbone's own, and for pictures.
        fps: of the result; None for the backbone's own.
        motion_bucket, noise_augmentation: for a model that is told; the defaults are Stable Video Diffusion's own.
    """

    task: str | None = None
    pictures: tuple[Image.Image, ...] = ()
    clip: Clip | None = None
    frames: int | None = None
    fps: float | None = None
    motion_bucket: float = 127.0
    noise_augmentation: float = 0.02

    @property
    def media(self) -> tuple[Image.Image | Clip, ...]:
        """All that a planner sees, in the order it is shown."""
        return (*self.pictures, *([self.clip] if self.clip is not None else []))

    @property
    def first_frame(self) -> Image.Image | None:
        """The picture that a video begins with."""
        return self.pictures[0] if self.task == "image-to-video" else None

    @property
    def references(self) -> tuple[Image.Image, ...]:
        """The pictures whose subjects appear in a video."""
        return self.pictures if self.task == "in-context-video" else ()


def given_media(
    checkpoint: Checkpoint,
    task: str | None = None,
    *,
    image: Any = None,
    video: Any = None,
    frames: int | None = None,
    fps: float | None = None,
    **motion: float,
) -> Given:
    """Opens what a request gives; the arguments are those of :meth:`mc_runtime.Runtime.generate`.

    A clip is resampled to `fps`, and cut to `frames`, or to the most of its own that whole latent frames stand for.

    Raises:
        RequestError: the checkpoint cannot do the task, or a picture or clip cannot be opened.
    """
    media = {name: given for name, given in (("image", image), ("video", video)) if given is not None}
    tasks = checkpoint.config.tasks if checkpoint.config else checkpoint.backbone.tasks
    found = task_for(tasks, task, media).task
    images = [] if image is None else image if isinstance(image, list | tuple) else [image]
    pictures = tuple(load_image(one) for one in images)
    clip = None
    if video is not None:
        clip = load_clip(video, fps=fps or checkpoint.defaults.fps, max_frames=frames)
        frames = 1 + (len(clip) - 1) // checkpoint.strides.time * checkpoint.strides.time
        clip = Clip(clip.frames[:frames], clip.fps)
    return Given(found, pictures, clip, frames, fps, **motion)


class MediaEncoder:
    """Pictures and clips to latents by diffusers' image processor and autoencoder.

    Args:
        checkpoint: says how latents are scaled.
        vae: its autoencoder.
        dtype: of that.
    """

    def __init__(self, checkpoint: Checkpoint, vae: nn.Module, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._vae: Any = vae
        self._dtype = dtype
        self._processor = VaeImageProcessor(vae_scale_factor=1)

    def picture(self, picture: Image.Image, size: tuple[int, int], noise: Tensor | None = None) -> Tensor:
        """Latents `[C, H, W]` of a picture at (height, width), with `noise` `[3, h, w]` added to its pixels from -1 to 1."""
        pixels = self._pixels([picture], size)
        return self._encoded(pixels if noise is None else pixels + noise)[0]

    def clip(self, frames: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        """Latents `[C, T, H, W]` of a clip's frames at (height, width)."""
        pixels = self._pixels(frames, size)
        if self._checkpoint.strides.time > 1:
            return self._encoded(pixels.transpose(0, 1)[None])[0]
        return self._encoded(pixels).transpose(0, 1)

    def _pixels(self, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        height, width = size
        pixels: Tensor = self._processor.preprocess(list(pictures), height=height, width=width)
        return pixels

    def _encoded(self, pixels: Tensor) -> Tensor:
        """Of a distribution the mode, in the scale of the backbone's latents unless it takes the autoencoder's own."""
        encoded = self._vae.encode(pixels.to(self._dtype), return_dict=False)[0]
        values = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        if self._checkpoint.backbone.scales_encoded:
            values = self._checkpoint.autoencoder.scaling(self._checkpoint.vae_config).to(self._dtype).latents(values)
        latents: Tensor = values.float()
        return latents
