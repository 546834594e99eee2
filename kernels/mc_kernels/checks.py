"""What every launcher asserts before a launch: a kernel that reads outside its tensors fails far from its cause, or never."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mc_kernels.launch import interpreting, recording, tracing

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_GRID = (2**31 - 1, 65535, 65535)  # CUDA's limits on the three grid dimensions

Extent = int | str
Layout = Literal["contiguous", "rows", "strided"]


def describe(tensor: Tensor) -> str:
    """Shape and dtype as error messages print them, for instance ``[2, 63, 64] bfloat16``."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class Operands:
    """Checks the tensors of one launch; sizes named by a letter must agree wherever the letter occurs.

    Args:
        operator: the name that error messages begin with.
        device: where all tensors must lie.
    """

    def __init__(self, operator: str, device: torch.device) -> None:
        self.operator = operator
        self.device = device
        self.sizes: dict[str, int] = {}

    def require(self, condition: bool, message: str) -> None:
        """Raises `ValueError` with the operator's name in front."""
        if not condition:
            raise ValueError(f"{self.operator}: {message}")

    def add(
        self,
        name: str,
        tensor: Tensor,
        shape: tuple[Extent, ...],
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        *,
        layout: Layout = "contiguous",
    ) -> None:
        """One tensor.

        Args:
            name: the argument's name.
            tensor: its value.
            shape: an int where the size is fixed, a letter where it is shared between tensors.
            dtypes: those the kernel is written for.
            layout: what the kernel's addresses allow: a contiguous tensor, contiguous last dimensions, or any strides.

        Raises:
            ValueError: with what is wrong, and the call that mends it.
        """
        wanted = ", ".join(f"{extent}={self.sizes[extent]}" if extent in self.sizes else str(extent) for extent in shape)
        self.require(tensor.ndim == len(shape), f"{name} is {describe(tensor)}; reshape it to [{wanted}]")
        for extent, size in zip(shape, tensor.shape, strict=True):
            known = extent if isinstance(extent, int) else self.sizes.setdefault(extent, size)
            self.require(known == size, f"{name} is {describe(tensor)}; it must be [{wanted}]")
        self.require(tensor.numel() > 0, f"{name} is {describe(tensor)} and empty; skip the call when there is nothing to do")
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        self.require(tensor.dtype in dtypes, f"{name} is {describe(tensor)}; convert it with .to() to one of: {names}")
        self.require(tensor.device == self.device, f"{name} is on {tensor.device}; move it to {self.device} with .to()")
        fits = {
            "contiguous": tensor.is_contiguous(),
            "rows": tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
            "strided": True,
        }
        self.require(fits[layout], f"{name} has strides {list(tensor.stride())}; call .contiguous() on it")

    def launchable(self, grid: tuple[int, ...]) -> None:
        """Raises unless a kernel can run on this device with this grid."""
        can_run = self.device.type == "cuda" or interpreting() or recording() or tracing()
        self.require(can_run, f"tensors are on {self.device}; move them to a CUDA device, or call the reference")
        for axis, (programs, limit) in enumerate(zip(grid, MAX_GRID, strict=False)):
            self.require(programs <= limit, f"{programs} programs on grid axis {axis}, at most {limit}; split the batch")


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What a reference computes in: float32 for all narrower types, float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def split_width(width: int) -> tuple[int, int]:
    """Two powers of two that cover a width: 2240 as 2048 + 256 leaves 3 % of the lanes idle, one block of 4096 leaves 45 %."""
    head = next_power_of_two(width) // 2 or 1
    return head, next_power_of_two(max(1, width - head))
