"""Text to video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mc_runtime.tasks.request import VideoRequest


@dataclass(frozen=True, eq=False, kw_only=True)
class TextToVideo(VideoRequest):
    """Videos of prompts."""

    task: ClassVar[str] = "text-to-video"
