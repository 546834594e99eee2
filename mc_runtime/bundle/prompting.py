"""Prompting in the manifest: how a prompt becomes token ids for each model that reads text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mc_runtime.bundle.checks import at_least_one
from mc_runtime.bundle.vision import Vision


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the prompt's frame: fixed text, or the slot of the prompt, or that of its pictures and clips."""

    text: str | None = None
    slot: Literal["prompt", "media"] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.slot is None):
            raise ValueError("a segment has either text or a slot")


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How a prompt becomes token ids for one engine.

    `negative_segments` frames the negative prompt where it differs. `max_tokens` counts the frame too, but not the
    tokens of pictures and clips; `vision` says how those are read, where they are. `select` are the rows of the
    padded sequence that the text encoder keeps (negative ones count from the end), as SANA does after its
    instruction. `gives_context` is off for an encoder that gives a pooled vector only; `padding_counts` is on where
    the backbone reads the padded rows too, as it was trained to; without `pad_to_max`, one of them stands for all,
    because they are equal.
    """

    tokenizer: str
    segments: tuple[Segment, ...]
    negative_segments: tuple[Segment, ...] | None = None
    normalize: Literal["none", "lower_strip", "clean"] = "none"
    max_tokens: int
    negative_max_tokens: int | None = None
    truncate: bool
    pad_id: int
    pad_to_max: bool = False
    end_token_id: int | None = None
    select: tuple[int, ...] | None = None
    gives_context: bool = True
    padding_counts: bool = False
    vision: Vision | None = None

    def __post_init__(self) -> None:
        at_least_one(max_tokens=self.max_tokens, negative_max_tokens=self.negative_max_tokens or 1)
        if self.pad_id < 0 or (self.end_token_id or 0) < 0:
            raise ValueError("pad_id, end_token_id: expected 0 or more")
        if any(not -self.max_tokens <= row < self.max_tokens for row in self.select or ()):
            raise ValueError(f"select: expected rows from {-self.max_tokens} to {self.max_tokens - 1}")
        for segments in (self.segments, self.negative_segments or self.segments):
            if (self.vision is None) != all(segment.slot != "media" for segment in segments):
                raise ValueError("segments: a slot for media belongs to a prompting with vision, and to no other")


@dataclass(frozen=True, kw_only=True)
class PromptingSet:
    """The prompting of each model that reads text; the `text_encoder` engine holds up to two."""

    planner: Prompting | None = None
    text_encoder: Prompting | None = None
    text_encoder_2: Prompting | None = None

    @property
    def all(self) -> tuple[Prompting, ...]:
        """Those that there are."""
        return tuple(spec for spec in (self.planner, self.text_encoder, self.text_encoder_2) if spec)
