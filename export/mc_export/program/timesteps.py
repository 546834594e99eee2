"""Timesteps that survive bf16: whole numbers until they meet their frequencies.

OpenVINO's bf16 hint also rounds what only changes a tensor's shape, marked for float32 or not, and between 512 and 1000 bf16
numbers are 4 apart: the model is then told of another timestep. Whole numbers are never rounded.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

#: A power of two, so that scaling is exact; the largest for which 2,047 still fits into 32 bits.
STEPS_PER_UNIT = 2**20


def fixed_point(timestep: Tensor) -> Tensor:
    """Timesteps f32 below 2,048 as i32 multiples of 2**-20: exact from 8 upwards, and to 5e-7 below."""
    return (timestep * STEPS_PER_UNIT).round().to(torch.int32)


def use_fixed_point_timesteps(module: nn.Module) -> int:
    """Makes every sinusoidal embedding below `module`, in place, take what `fixed_point` gives; returns how many there are."""
    found = [layer for layer in module.modules() if isinstance(layer, Timesteps)]
    for layer in found:
        layer.scale /= STEPS_PER_UNIT
    return len(found)
