"""From a request to its plans: every prompt and negative prompt of it, with the pictures that they are read with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mc_runtime.bundle.manifest import Component
from mc_runtime.bundle.store import Bundle
from mc_runtime.lora import PLAIN, ActiveLora
from mc_runtime.runtime.engines import Engines
from mc_runtime.runtime.plan import Plan
from mc_runtime.runtime.planning import EncodedPrompt, Planning
from mc_runtime.runtime.work import Work
from mc_runtime.tasks.request import Request

EncodedPrompts = list[list[EncodedPrompt]]
"""Of every prompt: it, and its negative prompt where guidance uses one."""


class RequestPlanning:
    """Plans whole requests to one bundle."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self._bundle = bundle
        self._engines = engines
        self._planning = Planning(bundle, engines)

    def forget(self) -> None:
        """Empty the cache of plans."""
        self._planning.forget()

    def encode(self, request: Request, lora: ActiveLora = PLAIN) -> EncodedPrompts:
        """Token ids of every prompt, and of its negative prompt where guidance uses it.

        Both come with the request's pictures and clip: guidance leads away from what the negative prompt says of them.

        Raises:
            RequestError: a prompt is too long, or a picture cannot be looked at.
        """
        clip = request.clip
        seen = self._planning.look((*request.pictures, *([] if clip is None else [clip])))
        embedded = self._bundle.manifest.conditioning == "image_encoder" and request.pictures
        pixels = np.asarray(request.pictures[0], np.float32) / np.float32(255) if embedded else None
        encode = partial(self._planning.encode, seen=seen, picture=pixels, lora=lora)
        pairs = zip(request.prompts, request.negative_prompts, strict=True)
        if not request.uses_guidance:
            return [[encode(prompt)] for prompt, _ in pairs]
        return [[encode(prompt), encode(negative, negative=True)] for prompt, negative in pairs]

    def components(self, encoded: EncodedPrompts) -> tuple[Component, ...]:
        """The engines that plan these prompts."""
        return self._planning.components(text for texts in encoded for text in texts)

    def rows(self, request: Request, encoded: EncodedPrompts) -> int:
        """Context rows of the longest branch in the first batch."""
        prompts = -(-self._bundle.manifest.max_batch // request.num_images)
        return max(self._planning.rows(text, request.size) for texts in encoded[:prompts] for text in texts)

    def plans(self, request: Request, encoded: EncodedPrompts, work: Work, media: Mapping[str, Any]) -> tuple[Plan, ...]:
        """One plan a prompt; `media` is what the task was given, for renders of the plan. Raises EngineError or Cancelled."""
        self._engines.wait_for(self.components(encoded), work)
        plans = []
        for prompt, negative, texts in zip(request.prompts, request.negative_prompts, encoded, strict=True):
            work.stop_if_cancelled()
            with work.stopwatch.stage("plan"):
                branches = tuple(self._planning.branch(text, request.size, work.clock) for text in texts)
            lora = texts[0].lora
            plans.append(Plan(prompt, negative, request.size, branches, self._bundle.digest, request.task, dict(media), lora))
        return tuple(plans)
