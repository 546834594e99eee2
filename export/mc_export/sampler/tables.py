"""Builds the sampler table of a checkpoint: every step count, and every token count where the schedule depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mc_export.quiet import quiet
from mc_export.sampler.drive import Array, Drive, drive
from mc_export.sampler.errors import UnsupportedSchedulerError
from mc_export.sampler.solve import MAX_ORDER, residual, solve
from mc_export.sampler.suitability import check_suitable
from mc_export.sampler.timesteps import SetTimesteps, plain_timesteps
from mc_runtime.sampling.tables import STATIC, SamplerTable, StepTable

RESIDUAL_TOLERANCE = 1e-6


@dataclass(frozen=True)
class _Solved:
    """One step count: its run, its coefficients `[E, 1 + 2*order]` and their replay error."""

    run: Drive
    coefficients: Array
    error: float


def build_sampler_table(
    scheduler: Any,
    *,
    max_steps: int = 100,
    step_counts: Sequence[int] | None = None,
    token_counts: Sequence[int] = (),
    interpolates: bool = False,
    set_timesteps: SetTimesteps | None = None,
    timestep_scale: float = 1.0,
) -> SamplerTable:
    """Solves for the coefficients of `scheduler` at every step count from 1 to `max_steps`.

    A step count that the scheduler itself cannot do (it raises, or gives numbers that are not finite) is left out of the table.

    Args:
        scheduler: any deterministic diffusers scheduler that evaluates the model once a step.
        max_steps: the largest step count to serve.
        step_counts: the only step counts to serve, where not all up to `max_steps` are wanted.
        token_counts: latent token counts to serve, where the schedule depends on them; empty for a static schedule.
        interpolates: whether those counts are nodes, and all between them are served, too; see :func:`token_nodes`.
        set_timesteps: how the pipeline sets the timesteps; `scheduler.set_timesteps(steps)` by default.
        timestep_scale: what the backbone multiplies timesteps by (SANA's `timestep_scale`).

    Raises:
        UnsupportedSchedulerError: the scheduler is stochastic, not linear, of a higher order than 5, or evaluates the model
            several times a step.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    set_timesteps = set_timesteps or plain_timesteps
    keys: dict[str, int | None] = {str(count): count for count in token_counts} or {STATIC: None}
    name = type(scheduler).__name__
    solved: dict[str, list[_Solved | None]] = {}
    order = 1
    with quiet("diffusers.schedulers"), np.errstate(all="ignore"):
        check_suitable(scheduler, next(iter(keys.values())), set_timesteps)
        for key, tokens in keys.items():
            solved[key] = []
            for steps in range(1, max_steps + 1):
                wanted = step_counts is None or steps in step_counts
                entry = _solved(scheduler, steps, tokens, set_timesteps, order) if wanted else None
                order = max(order, _order(entry.coefficients)) if entry else order
                solved[key].append(entry)
            if not any(solved[key]):
                raise UnsupportedSchedulerError(f"{name} gives no finite schedule for any step count up to {max_steps}")
    worst = max(entry.error for entries in solved.values() for entry in entries if entry)
    tables = {key: _step_table(entries, order, timestep_scale) for key, entries in solved.items()}
    return SamplerTable(name, tables, {"residual": f"{worst:.3g}", "timestep_scale": repr(timestep_scale)}, interpolates)


def _solved(scheduler: Any, steps: int, tokens: int | None, set_timesteps: SetTimesteps, min_order: int) -> _Solved | None:
    """One step count, or None where the scheduler cannot do it."""
    try:
        run = drive(scheduler, steps, tokens, set_timesteps)
    except (ArithmeticError, IndexError, ValueError):
        return None
    if not run.is_finite:
        return None
    coefficients = solve(run, min_order)
    name = type(scheduler).__name__
    if coefficients is None:
        raise UnsupportedSchedulerError(f"{name} is not a linear multistep rule of order {MAX_ORDER} or less ({steps} steps)")
    error = residual(run, coefficients)
    if error > RESIDUAL_TOLERANCE:
        raise UnsupportedSchedulerError(
            f"{name} is not linear in latents and predictions: a table misses its own step by {error:.1e} ({steps} steps)"
        )
    return _Solved(run, coefficients, error)


def _order(coefficients: Array) -> int:
    return (coefficients.shape[1] - 1) // 2


def _step_table(entries: Sequence[_Solved | None], order: int, timestep_scale: float) -> StepTable:
    """Lays the step counts one after another, all padded with zeros to one order."""
    lengths = [entry.run.evaluations if entry else 0 for entry in entries]
    done = [entry for entry in entries if entry]
    return StepTable(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        timesteps=np.concatenate([entry.run.timesteps for entry in done]) * timestep_scale,
        coefficients=np.concatenate([_padded(entry.coefficients, order) for entry in done]),
        init_noise_sigma=np.array([entry.run.init_noise_sigma if entry else 1.0 for entry in entries]),
    )


def _padded(coefficients: Array, order: int) -> Array:
    """`coefficients` widened to `order`: the further lags have weight zero."""
    own = _order(coefficients)
    padding = np.zeros((len(coefficients), order - own))
    return np.hstack([coefficients[:, : 1 + own], padding, coefficients[:, 1 + own :], padding])
