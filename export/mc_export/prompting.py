"""How a checkpoint's prompts are made, frozen into the manifest: the frame's text, the limits, and a tokenizer file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mc_export.backbones.base import Backbone
from mc_export.model.config import MetaCanvasConfig
from mc_export.tokenizers import pad_id, save_tokenizer
from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.errors import CheckpointError
from mc_runtime.prompting.template import framed
from mc_runtime.prompting.tokenizer import Prompter

SENTINEL = "\ue000prompt\ue001"
"""Stands for the prompt while a chat template is rendered: private-use characters that no template contains."""
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
    processor: Any, config: MetaCanvasConfig, folder: Path, name: str = "planner_tokenizer.json"
) -> Prompting:
    """The planner's chat frame, closed by the end token `<EoS>` (paper, section 3.1); writes the tokenizer to `folder/name`.

    Args:
        processor: transformers' processor of the planner, or its tokenizer, with a chat template.
        config: the checkpoint's `metacanvas.json`.
        folder: the bundle in the making.
        name: the tokenizer's file in it.

    Raises:
        CheckpointError: there is no fast tokenizer or no chat template, the template alters the prompt, the end token is not in
            the vocabulary, the frame alone exceeds the limit, or the saved tokenizer does not give the processor's ids.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    end_token = config.prompt.end_token or tokenizer.eos_token
    end_id = None if end_token is None else tokenizer.get_vocab().get(end_token)
    if end_id is None:
        raise CheckpointError(f"processor/: the end token {end_token!r} is not in the vocabulary; set prompt.end_token")

    def rendered(prompt: str) -> str:
        messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        try:
            return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except ValueError as error:
            raise CheckpointError("processor/: there is no chat template; add chat_template.jinja") from error

    segments = _segments(rendered(SENTINEL))
    for probe in PROBES:
        if framed(segments, probe) != rendered(probe):
            raise CheckpointError(f"processor/: the chat template alters the prompt {probe!r}; it must insert it as it is")
    save_tokenizer(tokenizer, folder / name)
    frame = len(tokenizer(rendered("") + end_token).input_ids)
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
    )
    _check(prompting, folder, lambda prompt: tokenizer(rendered(prompt) + end_token).input_ids)
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


def _segments(rendered: str) -> tuple[Segment, ...]:
    """`rendered` cut at the sentinel."""
    before, found, after = rendered.partition(SENTINEL)
    if not found or SENTINEL in after:
        raise CheckpointError("processor/: the chat template must contain the user's text exactly once")
    pieces = (Segment(text=before), Segment(slot="prompt"), Segment(text=after))
    return tuple(piece for piece in pieces if piece.text != "")


def _check(prompting: Prompting, folder: Path, expected: Callable[[str], list[int]]) -> None:
    """Compares the saved tokenizer with the checkpoint's on prompts that are hard to get right."""
    prompter = Prompter(prompting, folder)
    for probe in PROBES:
        encoded = prompter.encode([probe])
        length = None if prompting.pad_to_max else encoded.lengths[0]
        if encoded.input_ids[0, :length].tolist() != list(expected(probe)):
            raise CheckpointError(f"the saved tokenizer gives other ids than the checkpoint's own for {probe!r}")
