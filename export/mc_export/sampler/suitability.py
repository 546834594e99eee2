"""Which schedulers a table can stand for, asked before any is built: deterministic, unclipped, one evaluation a step."""

from __future__ import annotations

from typing import Any

import numpy as np

from mc_export.sampler.drive import drive
from mc_export.sampler.errors import UnsupportedSchedulerError
from mc_export.sampler.timesteps import SetTimesteps

PROBE_STEPS = 5
_CLIPPING = ("thresholding", "clip_sample", "clip_model_output")
_INSTEAD = "FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler or EulerDiscreteScheduler"


def check_suitable(scheduler: Any, tokens: int | None, set_timesteps: SetTimesteps) -> None:
    """Runs a few steps twice, with two seeds.

    Raises:
        UnsupportedSchedulerError: the scheduler clips, fails, evaluates the model several times a step, or draws noise.
    """
    name = type(scheduler).__name__
    for option in _CLIPPING:
        if scheduler.config.get(option):
            raise UnsupportedSchedulerError(
                f'{name} with "{option}": true is not linear; set it to false in the checkpoint\'s '
                "scheduler/scheduler_config.json (latents are not pixels: clipping them is seldom meant)"
            )
    if scheduler.config.get("stochastic_sampling"):
        raise UnsupportedSchedulerError(
            f'{name} with "stochastic_sampling": true draws noise in every step; set it to false in the checkpoint\'s '
            "scheduler/scheduler_config.json"
        )
    try:
        first, second = (drive(scheduler, PROBE_STEPS, tokens, set_timesteps, seed) for seed in (1, 2))
    except Exception as error:  # a scheduler may fail in any way; whatever it is, it cannot be tabled
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnsupportedSchedulerError(f"{name} cannot be driven step by step: {reason}") from error
    if first.evaluations > PROBE_STEPS + 1:
        raise UnsupportedSchedulerError(
            f"{name} evaluates the model {first.evaluations} times in {PROBE_STEPS} steps; use {_INSTEAD}"
        )
    if not np.array_equal(first.samples, second.samples, equal_nan=True):
        raise UnsupportedSchedulerError(f"{name} is stochastic: it draws noise between steps; use {_INSTEAD}")
