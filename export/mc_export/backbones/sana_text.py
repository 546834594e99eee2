"""SANA's text: `SanaPipeline`'s prompts, and what Gemma 2 makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.backbones.spec import TextTokens
from mc_export.backbones.text_masks import causal_bias
from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment


def _defaults() -> tuple[str, int]:
    """The "complex human instruction" before a positive prompt, and `max_sequence_length`."""
    from diffusers import SanaPipeline

    defaults = inspect.signature(SanaPipeline.__call__).parameters
    return "\n".join(defaults["complex_human_instruction"].default), defaults["max_sequence_length"].default


def sana_tokens(tokenizer: Any, prompts: Sequence[str], *, negative: bool) -> TextTokens:
    """Ids, mask and selected rows as diffusers' `SanaPipeline` makes them: of the padded sequence, the first row and the last
    `max_sequence_length - 1` rows become context."""
    instruction, limit = _defaults()
    instruction = "" if negative else instruction
    texts = [instruction + prompt.lower().strip() for prompt in prompts]
    length = limit if negative else len(tokenizer.encode(instruction)) + limit - 2
    encoded = tokenizer(
        texts, padding="max_length", padding_side="right", max_length=length, truncation=True, return_tensors="pt"
    )
    select = torch.tensor(list(range(limit)) if negative else [0, *range(length - limit + 1, length)])
    mask = encoded.attention_mask
    return TextTokens((encoded.input_ids,), (mask,), mask[:, select], select)


def sana_prompting(tokenizer: Any, file: str) -> Prompting:
    """The same for the runtime; `file` is the saved tokenizer."""
    instruction, limit = _defaults()
    total = len(tokenizer.encode(instruction)) + limit - 2
    return Prompting(
        tokenizer=file,
        segments=(Segment(text=instruction), Segment(slot="prompt")),
        negative_segments=(Segment(slot="prompt"),),
        normalize="lower_strip",
        max_tokens=total,
        negative_max_tokens=limit,
        truncate=True,
        pad_id=pad_id(tokenizer),
        select=(0, *range(total - limit + 1, total)),
    )


def gemma_states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Gemma 2's last hidden states `[B, L, D]`; masks are built here because transformers' own do not survive export."""
    config = encoder.config
    masks = {
        "full_attention": causal_bias(attention_mask, None),
        "sliding_attention": causal_bias(attention_mask, getattr(config, "sliding_window", None)),
    }
    states: Tensor = encoder(
        input_ids=input_ids,
        attention_mask={kind: masks[kind] for kind in set(config.layer_types)},
        position_ids=torch.arange(input_ids.shape[1], device=input_ids.device)[None],
        use_cache=False,
    ).last_hidden_state
    return states
