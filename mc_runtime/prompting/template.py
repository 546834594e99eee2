"""The text an engine reads: the prompt in its frame (a chat template or an instruction, rendered once at build time)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from mc_runtime.bundle.manifest import Segment

# Unicode's white space; Python counts four control characters more, which the pipeline leaves inside a prompt.
_SPACES = re.compile(r"[^\S\x1c-\x1f]+")


def normalized(prompt: str, how: str) -> str:
    """The prompt as the checkpoint was trained to read it.

    "lower_strip" is `SanaPipeline`'s; "clean" is `WanPipeline`'s: HTML entities resolved twice, white space one space each.
    """
    if how == "lower_strip":
        return prompt.lower().strip()
    if how == "clean":
        return _SPACES.sub(" ", html.unescape(html.unescape(prompt)).strip()).strip()
    return prompt


def framed(segments: Sequence[Segment], prompt: str, media: str = "") -> str:
    """The fixed texts with `prompt` and the texts of its pictures and clips, `media`, in their slots.

    One string, because token merges may cross the seams, as they did in training.
    """
    return "".join({"prompt": prompt, "media": media, None: segment.text or ""}[segment.slot] for segment in segments)
