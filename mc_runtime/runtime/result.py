"""What a request gives back, and what it tells after every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip
    from mc_runtime.runtime.plan import Plan


@dataclass(frozen=True)
class Step:
    """A finished denoising step, as `on_step` gets it.

    Attributes:
        index: how many were finished before it, over the whole request.
        total: how many the request has in all; larger requests run in several batches, one after another.
        timestep: what the model was told.
        seconds: how long it took.
        latents: gives a copy of the batch's latents f32 `[B, C, H, W]` after this step; to be called at once.
    """

    index: int
    total: int
    timestep: float
    seconds: float
    latents: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of a request, prompt after prompt.

    Attributes:
        images: Pillow images; empty where the request asked for latents.
        latents: the denoised latents f32 `[images, C, (T,) H, W]`, scaled as the model works on them.
        seeds: one an image; what was asked for, also where the caller gave the noise.
        timings: seconds for `load` (waiting for engines), `plan`, `encode` (input pictures), `denoise`, `decode`, `pixels`,
            and `total`; and in `engines` the part of `total` that was spent inside engines: but for `load`, the rest is the
            host's.
        plans: one a prompt.
        clips: videos, in place of images, where the task makes videos.
        computed_steps: one a result: the steps that were computed whole. All of them, but for requests with `cache`.
    """

    images: list[Image.Image]
    latents: NDArray[np.float32]
    seeds: tuple[int, ...]
    timings: dict[str, float]
    plans: tuple[Plan, ...]
    clips: list[Clip] = field(default_factory=list)
    computed_steps: tuple[int, ...] = ()

    @property
    def plan(self) -> Plan:
        """The plan of the first prompt."""
        return self.plans[0]
