"""How a checkpoint's prompts are made, frozen into the manifest: the frame's text, the limits, and a tokenizer file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mc_export.model.config import MetaCanvasConfig
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
        pad_id=_pad_id(tokenizer),
        end_token_id=end_id,
    )
    _check(prompting, folder, lambda prompt: tokenizer(rendered(prompt) + end_token).input_ids)
    return prompting


def sana_prompting(tokenizer: Any, folder: Path, name: str = "text_encoder_tokenizer.json") -> Prompting:
    """`SanaPipeline`'s prompts, read from its defaults: the "complex human instruction" before a positive prompt, and the
    first row and the last `max_sequence_length - 1` rows of the padded sequence as context.

    Args:
        tokenizer: the checkpoint's Gemma tokenizer.
        folder: the bundle in the making; the tokenizer is written to `folder/name`.
        name: the tokenizer's file.

    Raises:
        CheckpointError: there is no fast tokenizer, or the saved one does not give the same ids.
    """
    from diffusers import SanaPipeline

    defaults = inspect.signature(SanaPipeline.__call__).parameters
    limit: int = defaults["max_sequence_length"].default
    instruction = "\n".join(defaults["complex_human_instruction"].default)
    total = len(tokenizer.encode(instruction)) + limit - 2
    save_tokenizer(tokenizer, folder / name)
    prompting = Prompting(
        tokenizer=name,
        segments=(Segment(text=instruction), Segment(slot="prompt")),
        negative_segments=(Segment(slot="prompt"),),
        normalize="lower_strip",
        max_tokens=total,
        negative_max_tokens=limit,
        truncate=True,
        pad_id=_pad_id(tokenizer),
        select=(0, *range(total - limit + 1, total)),
    )

    def expected(prompt: str) -> list[int]:
        text = instruction + prompt.lower().strip()
        return list(tokenizer(text, max_length=total, truncation=True, padding=False).input_ids)

    _check(prompting, folder, expected)
    return prompting


def save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Writes the fast tokenizer behind a transformers one, free of padding and truncation left by earlier calls.

    Raises:
        CheckpointError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no fast tokenizer; save the checkpoint with one (tokenizer.json)"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    path.parent.mkdir(parents=True, exist_ok=True)
    copy.save(str(path))


def _segments(rendered: str) -> tuple[Segment, ...]:
    """`rendered` cut at the sentinel."""
    before, found, after = rendered.partition(SENTINEL)
    if not found or SENTINEL in after:
        raise CheckpointError("processor/: the chat template must contain the user's text exactly once")
    pieces = (Segment(text=before), Segment(slot="prompt"), Segment(text=after))
    return tuple(piece for piece in pieces if piece.text != "")


def _pad_id(tokenizer: Any) -> int:
    """The padding token, or any other: padding is masked everywhere."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def _check(prompting: Prompting, folder: Path, expected: Callable[[str], list[int]]) -> None:
    """Compares the saved tokenizer with the checkpoint's on prompts that are hard to get right."""
    prompter = Prompter(prompting, folder)
    for probe in PROBES:
        encoded = prompter.encode([probe])
        if encoded.input_ids[0, : encoded.lengths[0]].tolist() != list(expected(probe)):
            raise CheckpointError(f"the saved tokenizer gives other ids than the checkpoint's own for {probe!r}")
