"""CLIP's text encoder, as Stable Diffusion and FLUX use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mc_export.backbones.text_masks import causal_bias
from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment


def clip_outputs(encoder: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
    """What a ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` gives for right-padded ids and mask ``[B, L]``.

    Pipelines give it no mask; as attention is causal, padding changes no row up to the end token either way, and the pooled
    vector is the end token's row.
    """
    return encoder(input_ids=input_ids, attention_mask=causal_bias(attention_mask), **options)


def clip_tokens(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, 77]`` as diffusers' pipelines make them: cut and padded to the tokenizer's length."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids, encoded.attention_mask


def clip_prompting(tokenizer: Any, file: str, **options: Any) -> Prompting:
    """The same for the runtime; `file` is the saved tokenizer."""
    return Prompting(
        tokenizer=file,
        segments=(Segment(slot="prompt"),),
        max_tokens=int(tokenizer.model_max_length),
        truncate=True,
        pad_id=pad_id(tokenizer),
        **options,
    )
