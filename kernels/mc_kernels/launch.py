"""The one place where kernels are launched, so that launches can also be recorded without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_recordings: list[list[Launch]] = []
_traces: list[bool] = []


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
    """Runs the kernel on a grid of programs; inside `recorded` only notes it, inside `traced` adds it to the graph."""
    if _recordings:
        _recordings[-1].append(Launch(kernel, grid, arguments, options))
        return
    if _traces:
        torch.library.wrap_triton(kernel)[grid](*arguments, **options)
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


@contextmanager
def traced() -> Iterator[None]:
    """Lets a compiler that traces operators of ours see the kernels inside them, so that it takes those into its package.

    Outside, an operator stays one opaque node: a program is exported so, and on a CPU there is nothing else to see.
    """
    _traces.append(True)
    try:
        yield
    finally:
        _traces.pop()


def shows_kernels(operator: Any, launcher: Callable[..., Any]) -> None:
    """Inside `traced`, `operator` (of `torch.library.custom_op`) is what `launcher` does, with the same arguments."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def decomposed(mode: Any, target: Any, types: Any, arguments: Any, keywords: Any) -> Any:
        if not _traces:
            return mode.__torch_dispatch__(target, types, arguments, keywords)
        with mode:
            return launcher(*arguments, **keywords)

    operator.register_torch_dispatch(FunctionalTensorMode, decomposed)


def clamped(size: int, least: int, most: int) -> int:
    """`size` within bounds, `least` the stronger one; of a symbolic size symbolic too.

    So a compiled package chooses anew at every run: the sizes that it was traced at are small and say nothing of a request's.
    """
    bounded: int = torch.sym_max(least, torch.sym_min(most, size))
    return bounded


def tracing() -> bool:
    """Whether launches become part of a graph just now."""
    return bool(_traces)


def recording() -> bool:
    """Whether launches are collected just now."""
    return bool(_recordings)


def interpreting() -> bool:
    """Whether kernels were decorated for Triton's interpreter, which runs them on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
