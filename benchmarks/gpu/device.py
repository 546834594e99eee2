"""The device that is measured: its clock, its graphs, its memory. A CPU answers the same calls as well as it can (dry run)."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Launches = Callable[[], Any]

# Clock cycles, about half a millisecond: longer than the host takes to hand over a graph of some hundred launches.
_HEAD_START = 1_000_000


class Device:
    """A CUDA device, or a CPU in its place.

    Attributes:
        torch: where tensors go.
        is_cuda: whether times are those of CUDA events and `captured` makes graphs.
        backend: of `torch.compile`. On a CPU "eager" only traces what would be compiled, and None leaves it as it is: tracing
            takes a minute, and C++ minutes.
    """

    def __init__(self, kind: str = "cuda", trace: bool = False) -> None:
        self.torch = torch.device(kind)
        self.is_cuda = kind == "cuda"
        self.backend = "inductor" if self.is_cuda else "eager" if trace else None
        self._flushed = torch.empty(max(4 * self.l2_bytes, 4096), dtype=torch.uint8, device=self.torch)

    @property
    def name(self) -> str:
        """As the driver says it."""
        return torch.cuda.get_device_name() if self.is_cuda else "cpu"

    @property
    def l2_bytes(self) -> int:
        """Of the cache that has to be flushed; a dry run pretends there is none."""
        return int(torch.cuda.get_device_properties(0).L2_cache_size) if self.is_cuda else 1

    def synchronize(self) -> None:
        """Wait for all launches."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` under `torch.compile`, for the shapes it meets."""
        return torch.compile(function, backend=self.backend, dynamic=False) if self.backend else function

    def captured(self, launches: Launches) -> Callable[[], None]:
        """What replays `launches` as one CUDA graph, after they have run twice; on a CPU the launches themselves."""
        if not self.is_cuda:
            return launches
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                launches()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        replay: Callable[[], None] = graph.replay
        return replay

    def seconds(self, launches: Launches, *, ahead: bool = True) -> float:
        """One run of `launches` on the device's own clock, with the L2 cache flushed before it.

        With `ahead` the device idles until the host has handed over what follows, so that a short run is not measured by how
        fast that is done; without, launches that come late show.
        """
        self._flushed.zero_()
        if not self.is_cuda:
            start = time.perf_counter()
            launches()
            return time.perf_counter() - start
        if ahead:
            torch.cuda._sleep(_HEAD_START)
        else:
            self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launches()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def interleaved(self, launches: Mapping[str, Launches], rounds: int) -> dict[str, list[float]]:
        """Seconds of every run by name; each round runs each once, in an order shuffled anew (seeded)."""
        order = random.Random(0)
        found: dict[str, list[float]] = {name: [] for name in launches}
        for _ in range(rounds):
            for name in order.sample(list(launches), len(launches)):
                found[name].append(self.seconds(launches[name]))
        return found

    def warm_up(self, seconds: float = 0.7) -> None:
        """Matrix products until the clocks are those of a busy GPU."""
        if not self.is_cuda:
            return
        matrix = torch.randn(4096, 4096, device=self.torch, dtype=torch.bfloat16)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(20):
                torch.mm(matrix, matrix)
            self.synchronize()

    def allocated(self) -> int:
        """Bytes in use now."""
        return int(torch.cuda.memory_allocated()) if self.is_cuda else 0

    def peak(self) -> int:
        """Most bytes in use since `reset_peak`."""
        return int(torch.cuda.max_memory_allocated()) if self.is_cuda else 0

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def release(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


class Deadline:
    """Until when a section has to be done."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative when it has passed."""
        return self._end - time.perf_counter()


def one_line(error: BaseException) -> str:
    """An error as a report keeps it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
