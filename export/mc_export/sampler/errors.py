"""The error of a scheduler that no table can stand for."""

from __future__ import annotations

from mc_runtime.errors import CheckpointError


class UnsupportedSchedulerError(CheckpointError):
    """The scheduler is stochastic, not linear, or evaluates the model several times a step; the message names it."""
