"""CLIP's text encoder, as Stable Diffusion and FLUX use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment


class ClipStates(NamedTuple):
    """`penultimate` `[B, L, D]`, before the last layer; `last` `[B, L, D]`, normalised; `pooled` `[B, P]`, projected or not."""

    penultimate: Tensor
    last: Tensor
    pooled: Tensor


def clip_states(encoder: Any, input_ids: Tensor) -> ClipStates:
    """What a ``CLIPTextModel`` or ``CLIPTextModelWithProjection`` makes of padded ids ``[B, L]`` without an attention mask.

    Rows of padding see what is before them, as the pipelines of Stable Diffusion have it. Layers are called one by one with a
    causal mask made here: transformers' own does not survive export.
    """
    projection = getattr(encoder, "text_projection", None)
    model = encoder if projection is None else encoder.text_model
    hidden = model.embeddings(input_ids=input_ids)
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    causal = torch.where(order[:, None] >= order[None, :], 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)[None, None]
    penultimate = hidden
    for layer in model.encoder.layers:
        penultimate, hidden = hidden, layer(hidden, causal)
    last = model.final_layer_norm(hidden)
    # The end token of an old configuration is 2, and stands for the largest id there is.
    ends = input_ids if model.eos_token_id == 2 else input_ids == model.eos_token_id
    end = ends.to(torch.int32).argmax(dim=-1)
    pooled = last.gather(1, end[:, None, None].expand(-1, 1, last.shape[-1]))[:, 0]
    return ClipStates(penultimate, last, pooled if projection is None else projection(pooled))


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
