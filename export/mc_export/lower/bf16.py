"""A program that computes in bf16 or fp16 and keeps its signature: for targets that lower the torch program
itself, or take the type of every operator from its graph.

OpenVINO has a hint for this; a torch program has to be rewritten before it is exported. What is below the program (backbone,
planner, autoencoder) computes in 16 bits from weights of 16 bits; what the program's own forward does (guidance, the sampler's
update, the sinusoids of the timestep) stays in float32, as do inputs and outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mc_export.program.base import Program


def compute_in_bf16(program: Program) -> Program:
    """See :func:`compute_in`."""
    return compute_in(program, torch.bfloat16)


def compute_in(program: Program, dtype: torch.dtype) -> Program:
    """Changes `program` in place, weights included, and returns it; export it next, for it is no float32 reference any more.

    Buffers that are not saved with the weights (frequencies of rotary and sinusoidal embeddings) keep float32: their products
    with positions and timesteps reach far beyond what 16 bits tell apart.

    Args:
        program: in float32.
        dtype: bfloat16 or float16; what lies beyond 65504 becomes infinite in the latter.
    """
    lower_inputs = partial(_lower_inputs, dtype)
    for child in program.core.children():
        computing = [module for module in child.modules() if _is_cast(module, dtype)]
        # A child without weights (sinusoids, a scale) takes what it is given: a timestep in bf16 would be another one.
        for module in (child, *computing) if computing else ():
            module.register_forward_pre_hook(lower_inputs, with_kwargs=True)
    program.register_forward_hook(_raise_outputs)
    return program


def _is_cast(module: nn.Module, dtype: torch.dtype) -> bool:
    """Casts the weights that `module` itself holds; whether there were any."""
    found = False
    kept = module._non_persistent_buffers_set
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
                found = True
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in kept:
                setattr(module, name, buffer.to(dtype))
                found = True
    return found


def _lower_inputs(dtype: torch.dtype, _: nn.Module, arguments: Any, keywords: Any) -> Any:
    def lower(value: Any) -> Any:
        if isinstance(value, list):
            value[:] = [lower(each) for each in value]  # the same list: models leave results in lists they are given
            return value
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(lower, arguments, is_leaf=_is_list), tree_map(lower, keywords, is_leaf=_is_list)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _raise(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _raise_outputs(_: nn.Module, __: Any, outputs: Any) -> Any:
    return tree_map(_raise, outputs)
