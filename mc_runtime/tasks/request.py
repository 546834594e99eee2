"""What all tasks' requests have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.errors import RequestError
from mc_runtime.tasks import checks

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A request that this bundle can serve; one subclass a task.

    Attributes:
        prompts: one or more prompts; each gets `num_images` results.
        negative_prompts: one a prompt.
        num_images: pictures, or videos, a prompt.
        steps: denoising steps.
        guidance_scale: at 1 and below classifier-free guidance is off, and only the prompt's branch runs. A model that takes
            the scale as an input takes any.
        true_cfg_scale: of the negative prompt, where the model takes the guidance scale itself; at 1 and below off.
        size: (height, width) in pixels.
        seeds: one a result, prompt after prompt.
        latents: the caller's own unit noise f32 `[results, C, (T,) H, W]` in place of the seeds' noise.
        output: `images` (pictures or videos), or `latents` to stop before the decoder.
        branch_weights: what the prompt's and the negative prompt's predictions are multiplied by before they are added: f32
            `[branches]`, or `[branches, T]` where every frame has its own scale.
        latent_shape: of one result, `(C, H, W)` or `(C, T, H, W)`.
    """

    task: ClassVar[str]
    #: Names of the media arguments it needs.
    media: ClassVar[tuple[str, ...]] = ()

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    num_images: int
    steps: int
    guidance_scale: float
    true_cfg_scale: float
    size: tuple[int, int]
    seeds: tuple[int, ...]
    latents: NDArray[np.float32] | None
    output: checks.Output
    branch_weights: NDArray[np.float32]
    latent_shape: tuple[int, ...]

    @classmethod
    def from_arguments(
        cls,
        manifest: Manifest,
        *,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        output: str = "images",
        **own: Any,
    ) -> Self:
        """The request with the bundle's defaults filled in. Raises RequestError saying what can be served instead."""
        prompts = checks.checked_prompts(prompt, "prompt")
        count = checks.whole_number("num_images", num_images, 1, checks.MAX_IMAGES)
        side = checks.checked_size(manifest.sizes, size)
        results = len(prompts) * count
        scale = checks.checked_guidance(manifest, guidance_scale)
        negatives = checks.one_each(checks.checked_prompts(negative_prompt, "negative_prompt"), len(prompts))
        true_scale = checks.checked_true_cfg(manifest, true_cfg_scale, negatives)
        fields = cls.own_fields(manifest, **own)
        shape = latent_shape(manifest, side, fields.get("frames"))
        return cls(
            prompts=prompts,
            negative_prompts=negatives,
            num_images=count,
            steps=checks.whole_number("steps", manifest.steps.default if steps is None else steps, 1, manifest.steps.max),
            guidance_scale=scale,
            true_cfg_scale=true_scale,
            size=side,
            seeds=checks.checked_seeds(seed, results),
            latents=None if latents is None else checks.checked_latents(latents, (results, *shape)),
            output=checks.checked_output(output),
            branch_weights=_branch_weights(manifest, true_scale if manifest.guidance.true_cfg else scale, shape),
            latent_shape=shape,
            **fields,
        )

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """The fields that only this task has. Raises RequestError."""
        if own:
            raise RequestError(f"{cls.task} takes no {', '.join(sorted(own))}; leave it out")
        return {}

    @property
    def uses_guidance(self) -> bool:
        """Whether the negative branch has any weight."""
        return len(self.branch_weights) > 1

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        """Input pictures, RGB."""
        return ()

    @property
    def clip(self) -> Clip | None:
        """The input video."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoRequest(Request):
    """A request for videos.

    Attributes:
        frames: of each video.
        fps: frames a second.
    """

    frames: int
    fps: float

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """Frames and frame rate, and nothing else."""
        frames = manifest.frames
        if frames is None:
            raise RequestError("this bundle makes pictures, no videos")
        fps = own.pop("fps", None)
        count = checks.checked_frames(frames, own.pop("frames", None))
        rate = frames.fps if fps is None else checks.checked_number("fps", fps, 0.1, 1000)
        return {"frames": count, "fps": rate, **super().own_fields(manifest, **own)}


def latent_shape(manifest: Manifest, size: tuple[int, int], frames: int | None = None) -> tuple[int, ...]:
    """(C, H, W) of one picture's latents for (height, width) pixels; (C, T, H, W) of a video's."""
    latents = manifest.latents
    height, width = (side // latents.scale for side in size)
    if frames is None:
        return latents.channels, height, width
    return latents.channels, 1 + (frames - 1) // latents.frames, height, width


def _branch_weights(manifest: Manifest, scale: float, shape: tuple[int, ...]) -> NDArray[np.float32]:
    ramp, guidance = manifest.guidance.ramp_from, manifest.guidance
    if (guidance.branches == 1 and not guidance.true_cfg) or scale <= 1:
        return np.ones((1, shape[1]) if ramp is not None else 1, np.float32)
    scales: Any = scale if ramp is None else np.linspace(ramp, scale, shape[1], dtype=np.float32)
    return np.stack([np.asarray(scales, np.float32), np.asarray(1 - scales, np.float32)])
