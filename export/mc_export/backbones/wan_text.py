"""Wan's text: `WanPipeline`'s prompts, and what UMT5 makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.base import TextTokens
from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.prompting.template import normalized

MAX_TOKENS = 512  # `max_sequence_length` of `WanPipeline.__call__`; the model reads that many rows, padding included
_CLEAN: Final = "clean"
_MASK_BIAS = -10000.0


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
    """UMT5's last hidden states `[B, L, D]`, zero at padded rows, as the pipeline hands them to the transformer.

    The encoder's layers are called one by one because its own forward buckets distances by a logarithm of float32, whose
    last bit decides at powers of two and differs between libraries.
    """
    stack, config = encoder.encoder, encoder.config
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    reach = config.relative_attention_max_distance
    distances = (order[None, :] - order[:, None]).clamp(-reach, reach) + reach
    buckets = torch.tensor(distance_buckets(config.relative_attention_num_buckets, reach), device=input_ids.device)[distances]
    states: Tensor = stack.embed_tokens(input_ids)
    padding = ((1 - attention_mask) * _MASK_BIAS).to(states.dtype)[:, None, None, :]
    for block in stack.block:
        attention, feed_forward = block.layer
        layer = attention.SelfAttention
        normed = attention.layer_norm(states)
        query, key, value = (
            projection(normed).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for projection in (layer.q, layer.k, layer.v)
        )
        bias = F.embedding(buckets, layer.relative_attention_bias.weight).permute(2, 0, 1)[None] + padding
        attended = (query @ key.transpose(2, 3) + bias).softmax(dim=-1) @ value
        states = feed_forward(states + layer.o(attended.transpose(1, 2).flatten(2)))
    states = stack.final_layer_norm(states)
    return states * attention_mask[..., None].to(states.dtype)


def distance_buckets(count: int, reach: int) -> list[int]:
    """The bucket of every distance from `-reach` (a key before its query) to `reach`: T5's, for attention both ways.

    Args:
        count: buckets in all, `relative_attention_num_buckets`.
        reach: from here on, distances share the last bucket: `relative_attention_max_distance`.
    """
    half = count // 2
    exact = half // 2
    distances = np.arange(-reach, reach + 1)
    magnitude = np.abs(distances)
    ratio = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(reach / exact))
    logarithmic = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    buckets = np.where(magnitude < exact, magnitude, logarithmic) + half * (distances > 0)
    return [int(bucket) for bucket in buckets]
