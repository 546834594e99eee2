"""How a scheduler is told its timesteps: plainly by a step count, or shifted by the number of latent tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

SetTimesteps = Callable[[Any, int, int | None], None]
"""`hook(scheduler, steps, tokens)` calls the scheduler's `set_timesteps`; `tokens` is None for a static table."""


def plain_timesteps(scheduler: Any, steps: int, tokens: int | None) -> None:
    """`scheduler.set_timesteps(steps)`, what most pipelines do."""
    del tokens
    scheduler.set_timesteps(steps)


def dynamic_shift_timesteps(scheduler: Any, steps: int, tokens: int | None) -> None:
    """What diffusers' FLUX pipelines do: sigmas from 1 to 1/steps, shifted by `mu`, a line through two token counts.

    Source: `calculate_shift` and `__call__` of diffusers' `FluxPipeline`; the line's ends are in the scheduler's config.

    Args:
        scheduler: a flow-matching scheduler whose `set_timesteps` takes `mu` (and `sigmas` where it can).
        steps: the number of steps.
        tokens: the number of latent tokens after patchify.
    """
    if tokens is None:
        raise ValueError("a dynamically shifted schedule depends on the number of latent tokens; give token_counts")
    arguments: dict[str, Any] = {"mu": shift_of_tokens(scheduler.config, tokens)}
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), **arguments)
    else:
        scheduler.set_timesteps(steps, **arguments)


def shift_of_tokens(config: Any, tokens: int) -> float:
    """The exponent `mu` at `tokens`: a line through the config's base (tokens, shift) and max (tokens, shift)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (last - first) / (high - low)
    shift = tokens * slope + (first - slope * low)
    if not math.isfinite(shift):
        raise ValueError(f"the shift of {tokens} tokens is not finite")
    return float(shift)
