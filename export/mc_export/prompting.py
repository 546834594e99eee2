"""How a checkpoint's prompts are made, frozen into the manifest: the frame's text, the limits, and a tokenizer file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_export.backbones.base import Backbone
from mc_export.model.config import MetaCanvasConfig
from mc_export.tokenizers import pad_id, save_tokenizer
from mc_export.vision import SENTINEL, rendered
from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import CheckpointError
from mc_runtime.prompting.positions import Grid
from mc_runtime.prompting.template import framed
from mc_runtime.prompting.tokenizer import Prompter
from mc_runtime.prompting.vision import Seen

MEDIA_PROBES = (("image",), ("image", "image"), ("video",), ("image", "video", "image"), ("video", "image"))
PROBES = (
    "",
    "a red circle",
    "  Spaces  and CAPITALS \t",
    "two\nlines\n",
    "{{ prompt }} {% x %} <b>",
    "naïve 猫 🎨 e\u0301",
    "<|im_end|>",
)


def planner_prompting(
    processor: Any,
    config: MetaCanvasConfig,
    folder: Path,
    name: str = "planner_tokenizer.json",
    vision: Vision | None = None,
) -> Prompting:
    """The planner's chat frame, closed by the end token `<EoS>` (paper, section 3.1); writes the tokenizer to `folder/name`.

    Args:
        processor: transformers' processor of the planner, or its tokenizer, with a chat template.
        config: the checkpoint's `metacanvas.json`.
        folder: the bundle in the making.
        name: the tokenizer's file in it.
        vision: how pictures and clips are read, from :func:`mc_export.vision.planner_vision`; None for text only.

    Raises:
        CheckpointError: there is no fast tokenizer or no chat template, the template alters the prompt, the end token is not in
            the vocabulary, the frame alone exceeds the limit, or the saved tokenizer does not give the processor's ids.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    end_token = config.prompt.end_token or tokenizer.eos_token
    end_id = None if end_token is None else tokenizer.get_vocab().get(end_token)
    if end_id is None:
        raise CheckpointError(f"processor/: the end token {end_token!r} is not in the vocabulary; set prompt.end_token")

    segments = _segments(rendered(processor, SENTINEL), sees=vision is not None)
    for probe in PROBES:
        if framed(segments, probe) != rendered(processor, probe):
            raise CheckpointError(f"processor/: the chat template alters the prompt {probe!r}; it must insert it as it is")
    save_tokenizer(tokenizer, folder / name)
    frame = len(tokenizer(rendered(processor, "") + end_token).input_ids)
    if frame >= config.prompt.max_tokens:
        raise CheckpointError(
            f"metacanvas.json: prompt.max_tokens is {config.prompt.max_tokens}, and the frame around a prompt takes {frame}; "
            "raise it"
        )
    prompting = Prompting(
        tokenizer=name,
        segments=segments,
        max_tokens=config.prompt.max_tokens,
        truncate=False,
        pad_id=pad_id(tokenizer),
        end_token_id=end_id,
        vision=vision,
    )
    _check(prompting, folder, lambda prompt: tokenizer(rendered(processor, prompt) + end_token).input_ids)
    if vision is not None:
        _check_media(prompting, folder, lambda media: rendered(processor, "a cat", media) + end_token, tokenizer)
    return prompting


def text_prompting(backbone: Backbone, tokenizers: Sequence[Any], folder: Path) -> tuple[Prompting, ...]:
    """The prompts of a checkpoint's own text encoders, as its pipeline makes them; writes their tokenizers to `folder`.

    Raises:
        CheckpointError: there is no fast tokenizer, or the saved one does not give the pipeline's ids.
    """
    files = [f"{encoder.model}_tokenizer.json" for encoder in backbone.encoders]
    for tokenizer, name in zip(tokenizers, files, strict=True):
        save_tokenizer(tokenizer, folder / name)
    promptings = backbone.prompting(tokenizers, files)
    for index, prompting in enumerate(promptings):

        def expected(prompt: str, index: int = index, padded: bool = prompting.pad_to_max) -> list[int]:
            tokens = backbone.text_tokens(tokenizers, [prompt])
            ids, mask = tokens.input_ids[index][0], tokens.attention_masks[index][0]
            return [int(token) for token in (ids if padded else ids[mask.bool()])]

        _check(prompting, folder, expected)
    return promptings


def _segments(text: str, *, sees: bool = False) -> tuple[Segment, ...]:
    """A rendered template, cut at the sentinel; where the planner sees, with a slot for pictures in front of the prompt's."""
    before, found, after = text.partition(SENTINEL)
    if not found or SENTINEL in after:
        raise CheckpointError("processor/: the chat template must contain the user's text exactly once")
    media = (Segment(slot="media"),) if sees else ()
    pieces = (Segment(text=before), *media, Segment(slot="prompt"), Segment(text=after))
    return tuple(piece for piece in pieces if piece.text != "")


def _check(prompting: Prompting, folder: Path, expected: Callable[[str], list[int]]) -> None:
    """Compares the saved tokenizer with the checkpoint's on prompts that are hard to get right."""
    prompter = Prompter(prompting, folder)
    for probe in PROBES:
        encoded = prompter.encode([probe])
        length = None if prompting.pad_to_max else encoded.lengths[0]
        if encoded.input_ids[0, :length].tolist() != list(expected(probe)):
            raise CheckpointError(f"the saved tokenizer gives other ids than the checkpoint's own for {probe!r}")


def _check_media(prompting: Prompting, folder: Path, text: Callable[[Sequence[str]], str], tokenizer: Any) -> None:
    """The same for pictures and clips of any order: the template's text with each of their tokens repeated."""
    vision, prompter = prompting.vision, Prompter(prompting, folder)
    assert vision is not None
    blank = np.zeros((1, 1, 1, 3), np.uint8)
    for kinds in MEDIA_PROBES:
        seen = [Seen(blank, Grid(1, 2, 3 + index), kind == "video") for index, kind in enumerate(kinds)]
        expected = list(tokenizer(text(kinds)).input_ids)
        found = prompter.encode(["a cat"], seen=seen).input_ids[0].tolist()
        tokens = {vision.image_token_id, vision.clip_token_id}
        counts = iter(one.grid.tokens for one in seen)
        repeated = [token for each in expected for token in [each] * (next(counts, 0) if each in tokens else 1)]
        if found != repeated:
            raise CheckpointError(f"processor/: the chat template does not put {kinds} in order before the prompt")
