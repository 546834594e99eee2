"""Triton, or a stand-in where it is not installed: references and operators on CPU tensors need none of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["tl", "triton"]


class _MissingKernel:
    """A kernel decorated where Triton is missing: it imports, and says what to install when it is launched."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        self.__name__ = function.__name__

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(f"{self.__name__} needs Triton: `pip install triton`, or pass CPU tensors to run the reference")


class _MissingTriton:
    jit = staticmethod(_MissingKernel)


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = _MissingTriton(), None
