"""FLUX's text: CLIP's pooled vector, T5's states, and the schedule that its pipelines set."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mc_export.backbones.spec import TextStates, TextTokens
from mc_export.backbones.text_clip import clip_prompting, clip_states, clip_tokens
from mc_export.backbones.text_t5 import t5_states
from mc_export.sampler import dynamic_shift_timesteps
from mc_export.tokenizers import pad_id
from mc_runtime.bundle.manifest import Prompting, Segment


def _t5_length() -> int:
    """The pipelines' `max_sequence_length`."""
    from diffusers import FluxKontextPipeline

    return int(inspect.signature(FluxKontextPipeline.__call__).parameters["max_sequence_length"].default)


def flux_tokens(tokenizers: Sequence[Any], prompts: Sequence[str]) -> TextTokens:
    """Ids and masks of both encoders as ``FluxKontextPipeline.encode_prompt`` makes them; T5's padding counts as text."""
    clip, clip_mask = clip_tokens(tokenizers[0], prompts)
    t5 = tokenizers[1](list(prompts), padding="max_length", max_length=_t5_length(), truncation=True, return_tensors="pt")
    return TextTokens((clip, t5.input_ids), (clip_mask, t5.attention_mask), torch.ones_like(t5.attention_mask))


def flux_prompting(tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
    """The same for the runtime; `files` are the saved tokenizers."""
    return (
        clip_prompting(tokenizers[0], files[0], gives_context=False),
        Prompting(
            tokenizer=files[1],
            segments=(Segment(slot="prompt"),),
            max_tokens=_t5_length(),
            truncate=True,
            pad_id=pad_id(tokenizers[1]),
            pad_to_max=True,
            padding_counts=True,
        ),
    )


def flux_states(encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]) -> TextStates:
    """T5's states as context and CLIP's end token as pooled vector; T5 reads its padding, as the pipelines let it."""
    clip, t5 = encoders
    return TextStates(t5_states(t5, input_ids[1]), clip_states(clip, input_ids[0]).pooled)


def flux_timesteps(scheduler: Any, steps: int, tokens: int | None) -> None:
    """What FLUX's pipelines do: sigmas from 1 to 1/steps, shifted by the number of tokens where the scheduler does."""
    if scheduler.config.get("use_dynamic_shifting"):
        dynamic_shift_timesteps(scheduler, steps, tokens)
    elif "sigmas" in inspect.signature(scheduler.set_timesteps).parameters and not scheduler.config.get("use_flow_sigmas"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
