"""Samplers as tables of numbers, and the noise they start from."""

from mc_runtime.sampling.noise import initial_noise
from mc_runtime.sampling.tables import SamplerTable, Schedule, StepTable

__all__ = ["SamplerTable", "Schedule", "StepTable", "initial_noise"]
