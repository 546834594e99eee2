"""What a request gets that does not say: the checkpoint's own word where it has one, else that of its backbone's kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mc_export.backbones.base import Backbone
from mc_export.model.config import MetaCanvasConfig


@dataclass(frozen=True)
class Defaults:
    """Of a request that names none.

    Attributes:
        steps: denoising steps.
        guidance_scale: 1 is none.
        frames: of a video; None for pictures.
        fps: frames a second of a video.
    """

    steps: int
    guidance_scale: float
    frames: int | None
    fps: float


def defaults_of(backbone: Backbone, model_config: Any, config: MetaCanvasConfig | None) -> Defaults:
    """Of a checkpoint with this backbone and this ``metacanvas.json`` (None: a stock pipeline)."""
    kind = Defaults(
        backbone.default_steps, backbone.default_guidance, backbone.video_frames(model_config), backbone.default_fps
    )
    if config is None:
        return kind
    own = config.defaults
    return Defaults(
        steps=own.steps or kind.steps,
        guidance_scale=kind.guidance_scale if own.guidance_scale is None else own.guidance_scale,
        frames=kind.frames and (own.frames or kind.frames),
        fps=own.fps or kind.fps,
    )
