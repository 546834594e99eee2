"""Text to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mc_runtime.tasks.request import Request


@dataclass(frozen=True, eq=False, kw_only=True)
class TextToImage(Request):
    """Pictures of prompts."""

    task: ClassVar[str] = "text-to-image"
