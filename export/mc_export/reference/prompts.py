"""Prompts for the reference, by transformers' own tokenizers: the independent check of ``mc_runtime.prompting``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mc_export.model.config import MetaCanvasConfig


def chat_text(tokenizer: Any, config: MetaCanvasConfig, prompt: str, media: Sequence[str] = ()) -> str:
    """The chat-formatted instruction, closed by the end token (paper, section 3.1); `media` are kinds, `image` or `video`."""
    content = [*({"type": kind} for kind in media), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    end_token = config.prompt.end_token or tokenizer.eos_token
    formatted: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return formatted + end_token


def encode_for_planner(
    tokenizer: Any, config: MetaCanvasConfig, prompts: list[str], grid: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Keyword arguments of :class:`~mc_export.model.planner.Planner` for text-only instructions."""
    texts = [chat_text(tokenizer, config, prompt) for prompt in prompts]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    lengths = encoded.attention_mask.sum(dim=1)
    rows = torch.arange(encoded.input_ids.shape[1]).expand(3, len(prompts), -1)
    canvas = [canvas_positions(int(length), grid) for length in lengths]
    return {
        "input_ids": encoded.input_ids,
        "attention_mask": encoded.attention_mask,
        "position_ids": rows * encoded.attention_mask,
        "canvas_position_ids": torch.stack(canvas, dim=1),
    }


def canvas_positions(start: int, grid: tuple[int, int, int]) -> Tensor:
    """Multimodal RoPE positions ``[3, t, h, w]`` of a canvas whose first token follows ``start`` rows of text."""
    axes = torch.meshgrid(*(torch.arange(extent) + start for extent in grid), indexing="ij")
    return torch.stack(axes)
