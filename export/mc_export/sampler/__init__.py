"""Turns a checkpoint's own diffusers scheduler into a table of numbers, so that production needs no scheduler code."""

from mc_export.sampler.errors import UnsupportedSchedulerError
from mc_export.sampler.nodes import token_nodes
from mc_export.sampler.tables import build_sampler_table
from mc_export.sampler.timesteps import SetTimesteps, dynamic_shift_timesteps

__all__ = ["SetTimesteps", "UnsupportedSchedulerError", "build_sampler_table", "dynamic_shift_timesteps", "token_nodes"]
