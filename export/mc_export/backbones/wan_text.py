"""Wan's text: `WanPipeline`'s prompts, and what UMT5 makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from mc_export.backbones.spec import TextTokens
from mc_export.backbones.text_t5 import t5_states
from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.prompting.template import normalized

MAX_TOKENS = 512  # `max_sequence_length` of `WanPipeline.__call__`; the model reads that many rows, padding included
_CLEAN: Final = "clean"


def wan_tokens(tokenizer: Any, prompts: Sequence[str]) -> TextTokens:
    """Ids and mask as diffusers' `WanPipeline` makes them; every row of the padded sequence is context."""
    encoded = tokenizer(
        [normalized(prompt, _CLEAN) for prompt in prompts],
        padding="max_length",
        padding_side="right",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    mask = encoded.attention_mask
    return TextTokens((encoded.input_ids,), (mask,), torch.ones_like(mask))


def wan_prompting(tokenizer: Any, file: str) -> Prompting:
    """The same for the runtime; `file` is the saved tokenizer. One padded row stands for all: they are equal, see below."""
    return Prompting(
        tokenizer=file,
        segments=(Segment(slot="prompt"),),
        normalize=_CLEAN,
        max_tokens=MAX_TOKENS,
        truncate=True,
        pad_id=pad_id(tokenizer),
        padding_counts=True,
    )


def umt5_states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """UMT5's last hidden states `[B, L, D]`, zero at padded rows, as the pipeline hands them to the transformer."""
    states = t5_states(encoder, input_ids, attention_mask)
    return states * attention_mask[..., None].to(states.dtype)
