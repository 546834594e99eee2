"""What the card can do at most: the rates that everything else is a share of."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.device import Device, one_line
from benchmarks.gpu.sections import Found, Task
from mc_runtime.machine import installed_versions

ROUNDS = 15


def measure(task: Task) -> Found:
    """The card, then its ceilings."""
    device = task.open_device()
    yield "card", card(device)
    device.warm_up()
    copied = 1 << (14 if task.dry else 30)
    yield "copy", {"bytes": 2 * copied, "bytes_per_second": copy_rate(device, copied)}
    side = 64 if task.dry else 8192
    for name, product in (("gemm bf16", _bf16), ("gemm fp8", _fp8)):
        try:
            seconds = _median(device, product(device, side))
            yield name, {"side": side, "flops_per_second": 2 * side**3 / seconds}
        except (RuntimeError, NotImplementedError) as error:  # a card without e4m3
            yield name, {"side": side, "failed": one_line(error)}


def card(device: Device) -> dict[str, Any]:
    """Name, memory, compute capability and versions."""
    found: dict[str, Any] = {
        "name": device.name, "python": platform.python_version(), "versions": installed_versions(),
        "triton": installed_versions(("triton",)).get("triton"),
    }  # fmt: skip
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "memory": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": device.l2_bytes,
            "cuda": torch.version.cuda,
        }
    return found


def copy_rate(device: Device, size: int, sets: int = 1) -> float:
    """Bytes read and written a second by copies of `size` bytes, `sets` different ones in one graph."""
    pairs = [[torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.torch) for _ in range(2)] for _ in range(sets)]

    def copy() -> None:
        for target, source in pairs:
            target.copy_(source)

    return 2 * size * sets / _median(device, copy)


def _median(device: Device, launches: Callable[[], Any]) -> float:
    replay = device.captured(launches)
    return statistics.median(device.seconds(replay) for _ in range(ROUNDS))


def _bf16(device: Device, side: int) -> Callable[[], Any]:
    left, right = (torch.randn(side, side, device=device.torch, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _fp8(device: Device, side: int) -> Callable[[], Any]:
    """e4m3 with one scale a tensor; the second operand column by column, as the product wants it."""
    left, right = (torch.randn(side, side, device=device.torch).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device.torch)
    return lambda: torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
