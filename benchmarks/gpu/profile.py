"""Where the time of a request goes: seconds by kind of kernel, and how long the device waits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.device import Device
from mc_runtime.backends.base import Buffer, Call, Engine

# The first that matches a kernel's name, lower case, says its kind.
_KINDS = (
    (
        "our kernels",
        r"mc_kernels|canvas_inject|one_pass_kernel|partial_sums_kernel|attend_split_kernel|gated_residual_norm|glumb_depthwise"
        r"|guided_step|qk_norm_rope",
    ),
    # Before the others: such a kernel's name lists the operations that were fused into it.
    ("compiled by inductor", r"^triton_|torchinductor"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("convolutions", r"conv|fprop|dgrad|winograd"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|gemv|\bmm\b|addmm|\bbmm\b|linear|matmul|einsum"),
    ("copies", r"memcpy|memset|copy_|fillfunctor|::fill_|::zero_"),
)
OTHER, IDLE = "elementwise and norms", "idle"
KINDS = (*(name for name, _ in _KINDS), OTHER, IDLE)


def breakdown(device: Device, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kind over one `run`; `IDLE` is what lies between the device's first and last kernel and is none."""
    activity = ProfilerActivity.CUDA if device.is_cuda else ProfilerActivity.CPU
    wanted = DeviceType.CUDA if device.is_cuda else DeviceType.CPU
    device.synchronize()
    with profile(activities=[activity]) as found:
        run()
        device.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in found.events()
        if event.device_type == wanted and (device.is_cuda or event.cpu_parent is None)
    )
    seconds = dict.fromkeys(KINDS, 0.0)
    if not spans:
        return seconds
    done = spans[0][0]
    for start, end, name in spans:
        seconds[IDLE] += max(0.0, start - done) / 1e6
        seconds[kind_of(name)] += max(0.0, end - max(start, done)) / 1e6
        done = max(done, end)
    return seconds


def kind_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name.lower())), OTHER)


class Recorded(Engine):
    """An engine whose bound calls note when the device begins and ends each of them."""

    def __init__(self, engine: Engine, device: Device) -> None:
        super().__init__(engine.name, engine.path)
        self._engine, self._device = engine, device
        self.events: list[tuple[Any, Any]] = []

    def describe(self) -> Any:
        """See `Engine.describe`."""
        return self._engine.describe()

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """See `Engine.bind`."""
        return _RecordedCall(self._engine.bind(inputs, outputs), self)

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        """See `Engine.run`."""
        return self._engine.run(inputs)

    def idle_share(self) -> float | None:
        """Between the first call and the end of the last: the share outside calls; None without a GPU."""
        self._device.synchronize()
        if not self._device.is_cuda or len(self.events) < 2:
            return None
        gaps = sum(end.elapsed_time(start) for (_, end), (start, _) in zip(self.events, self.events[1:], strict=False))
        return float(gaps / self.events[0][0].elapsed_time(self.events[-1][1]))


class _RecordedCall(Call):
    def __init__(self, call: Call, engine: Recorded) -> None:
        self._call, self._engine = call, engine

    def run(self) -> None:
        if not self._engine._device.is_cuda:
            self._call.run()
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._call.run()
        end.record()
        self._engine.events.append((start, end))
