"""The one place where kernels are launched, so that launches can also be recorded without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_recordings: list[list[Launch]] = []


@dataclass(frozen=True)
class Launch:
    """What a launcher asked for.

    Args:
        kernel: the jitted function.
        grid: programs on each axis.
        arguments: positional arguments: tensors, ints and floats.
        options: compile-time arguments and `num_warps`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs the kernel on a grid of programs; inside `recorded`, only notes it."""
    if _recordings:
        _recordings[-1].append(Launch(kernel, grid, arguments, options))
        return
    tensor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device_of(tensor):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](*arguments, **options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects launches instead of running them; launchers then take tensors of the meta device, at any size."""
    _recordings.append([])
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def recording() -> bool:
    """Whether launches are collected just now."""
    return bool(_recordings)


def interpreting() -> bool:
    """Whether kernels were decorated for Triton's interpreter, which runs them on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
