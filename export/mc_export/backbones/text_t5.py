"""T5's encoder and UMT5's, layer by layer, in a form that survives export."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MASK_BIAS = -10000.0


def t5_states(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The last hidden states ``[B, L, D]`` of a ``T5EncoderModel`` or ``UMT5EncoderModel``.

    The encoder's layers are called one by one because its own forward buckets distances by a logarithm of float32, whose
    last bit decides at powers of two and differs between libraries.

    Args:
        encoder: T5 keeps one table of biases, in its first layer; UMT5 one a layer.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 1 at rows that may be seen; None for all.
    """
    stack, config = encoder.encoder, encoder.config
    order = torch.arange(input_ids.shape[1], device=input_ids.device)
    reach = config.relative_attention_max_distance
    distances = (order[None, :] - order[:, None]).clamp(-reach, reach) + reach
    buckets = torch.tensor(distance_buckets(config.relative_attention_num_buckets, reach), device=input_ids.device)[distances]
    states: Tensor = stack.embed_tokens(input_ids)
    for block in stack.block:
        attention, feed_forward = block.layer
        layer = attention.SelfAttention
        normed = attention.layer_norm(states)
        query, key, value = (
            projection(normed).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for projection in (layer.q, layer.k, layer.v)
        )
        if layer.has_relative_attention_bias:
            bias = F.embedding(buckets, layer.relative_attention_bias.weight).permute(2, 0, 1)[None]
            if attention_mask is not None:
                bias = bias + ((1 - attention_mask) * _MASK_BIAS).to(states.dtype)[:, None, None, :]
        attended = (query @ key.transpose(2, 3) + bias).softmax(dim=-1) @ value
        states = feed_forward(states + layer.o(attended.transpose(1, 2).flatten(2)))
    normalised: Tensor = stack.final_layer_norm(states)
    return normalised


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
