"""Whole models: every way's numbers are checked, then all are timed in interleaved rounds, then taken apart."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import weights
from benchmarks.gpu.device import Deadline, Device, one_line
from benchmarks.gpu.engines import PackageBuild, ours_of, sampler_of
from benchmarks.gpu.kernels import relative_l2
from benchmarks.gpu.pipelines import Ours, Reference, Request, Stopwatch
from benchmarks.gpu.profile import Recorded, breakdown
from benchmarks.gpu.sections import COMPILE, EAGER, Found, Task
from benchmarks.gpu.subjects import Subject, subject
from benchmarks.gpu.ways import WAYS, Way, compile_blocks
from mc_runtime.bench import summary_of

MOST_ROUNDS = 7
# Against float32: a way may be off by so many times what bfloat16 eager is. Without float32: the most two bfloat16s may differ.
TIMES_EAGERS_ERROR, MOST_DIFFERENCE = 2.0, 0.1
# In FP8, of weights that nothing was measured of; pictures are judged on the demos (docs/fp8.md).
MOST_FP8_ERROR = 0.25
# Of a section's time: when a package has to be there, and what the rounds and the profile keep.
PACKAGE_BY, KEPT_FOR_ROUNDS = 0.72, 0.2


@dataclass
class Contestant:
    """A way with what runs it and what was found of it."""

    way: Way
    draw: Callable[[Stopwatch, int], Tensor]
    ours: Ours | None
    found: dict[str, Any]
    rounds: list[dict[str, float]] = field(default_factory=list)


def measure(task: Task) -> Found:
    """Prepare, check, time, take apart; what does not run, or has no time left, is named with its reason."""
    torch.set_grad_enabled(False)
    device, deadline, chosen = task.open_device(), Deadline(task.budget), subject(task.section, task.dry)
    yield "subject", _facts(chosen)
    builds = not task.dry and (chosen.package or task.packages)
    package = PackageBuild(chosen.name) if builds else None
    try:
        contestants: dict[str, Contestant] = {}
        for name, found in _prepared(chosen, device, deadline, task, package, contestants):
            yield name, found
        if package is not None:
            package.end()  # one that came too late would go on compiling, on this GPU, beside what is timed
        device.release()
        device.warm_up()
        yield from _timed(device, deadline, task, chosen, contestants)
        # The profiler last: whatever it does to the process, everything else is there.
        for look in (_waits, _kinds):
            for name, contestant in contestants.items():
                if deadline.left < 3 and not task.dry:
                    return
                contestant.found |= look(device, chosen, contestant)
                yield name, contestant.found
    finally:
        if package is not None:
            package.close()


def _facts(chosen: Subject) -> dict[str, Any]:
    return {
        "latent": list(chosen.latent), "canvas": list(chosen.grid), "rows": chosen.rows, "steps": chosen.steps,
        "timed_steps": chosen.loop, "guidance": chosen.guidance, "branches": chosen.branches,
        "parts": ["plan", "denoise", "decode"] if chosen.autoencoder else ["denoise"],
    }  # fmt: skip


def _prepared(
    chosen: Subject, device: Device, deadline: Deadline, task: Task, package: PackageBuild | None,
    contestants: dict[str, Contestant],
) -> Found:  # fmt: skip
    """Every way that can be had, each with the error of its latents."""
    made = _Preparation(chosen, device)
    parts = zip(("backbone", "canvas", "planner", "autoencoder"), made.reference.modules, strict=True)
    yield "parameters", {name: sum(each.numel() for each in module.parameters()) for name, module in parts if module}
    for way in WAYS:
        if way.package and package is None:
            yield way.name, {"left_out": "packages of this model take minutes to compile; ask with --packages"}
        elif deadline.left < KEPT_FOR_ROUNDS * task.budget and not task.dry:
            yield way.name, {"left_out": "no time left in this section"}
        else:
            contestant = made.contestant(way, package, deadline.left - (1 - PACKAGE_BY) * task.budget)
            if isinstance(contestant, str):
                device.release()  # what it had may be what the next one needs
                yield way.name, {"left_out": contestant}
                continue
            contestants[way.name] = contestant
            yield way.name, contestant.found


class _Preparation:
    """What all ways of a subject share: weights, the request, the sampler, what their latents are compared with."""

    def __init__(self, chosen: Subject, device: Device) -> None:
        self._chosen, self._device = chosen, device
        self.reference = Reference(chosen, device)
        config = self.reference.model.config
        self._request, self._table = Request(chosen, config), sampler_of(chosen, config)
        self._judge = _Judge(chosen, device, self.reference, self._request)

    def contestant(self, way: Way, package: PackageBuild | None, patience: float) -> Contestant | str:
        """A way, checked, or why it cannot be had. `patience` is how many seconds it may wait for the package."""
        start = time.perf_counter()
        try:
            folder = package.wait(patience) if way.package and package else None
            made = self._made(way, folder)
            before = self._device.allocated()
            self._device.reset_peak()
            self._judge.check(made)
        except Exception as error:  # CUDA, inductor, Triton and ours; one way that cannot be had leaves the others
            if way.name == EAGER:
                raise
            return one_line(error)
        # As if it were alone: its weights, which it may share with others here, and what its run takes on top.
        made.found["peak_bytes"] = made.found["weight_bytes"] + self._device.peak() - before
        made.found["prepare_seconds"] = time.perf_counter() - start
        if way.package and package:
            made.found["package_seconds"] = package.seconds
        if made.ours is not None and (refused := made.ours.graph_refused):
            made.found["without_graph"] = refused
        return made

    def _made(self, way: Way, folder: Path | None) -> Contestant:
        found: dict[str, Any] = {"ours": way.ours, "variant": way.variant}
        request, device = self._request, self._device
        if way.ours:
            ours, found["weight_bytes"] = ours_of(self.reference, request, device, way, self._table, folder)
            return Contestant(way, lambda watch, steps: ours.draw(request, watch, steps), ours, found)
        own = self.reference
        if way.compiled:
            own = Reference(self._chosen, device, self.reference)
            compile_blocks(*own.modules, backend=device.backend)
        found["weight_bytes"] = weights.bytes_of(*own.modules)
        return Contestant(way, lambda watch, steps: own.draw(request, watch, steps), None, found)


class _Judge:
    """Compares latents: with the reference in float32 where that fits, otherwise with it in bfloat16."""

    def __init__(self, chosen: Subject, device: Device, reference: Reference, request: Request) -> None:
        self._device, self._steps = device, chosen.checked_steps
        self._eager = reference.draw(request, Stopwatch(device), self._steps)
        self._truth: Tensor | None = None
        self._without = "not asked for"
        if chosen.truth:
            try:
                self._truth = reference.truth(request, self._steps)
            except torch.OutOfMemoryError as error:
                self._without = one_line(error)
            device.release()

    def check(self, contestant: Contestant) -> None:
        """Runs it (which also compiles and captures it) and notes how far it is off. Raises ArithmeticError if too far."""
        for _ in range(2):  # a graph is captured by the second run of a step
            latents = contestant.draw(Stopwatch(self._device), self._steps)
        error = relative_l2(latents, self._eager)
        contestant.found |= {"error_against_eager": error, "checked_steps": self._steps}
        allowed = MOST_DIFFERENCE
        if self._truth is not None:
            eager = relative_l2(self._eager, self._truth)
            error, allowed = relative_l2(latents, self._truth), TIMES_EAGERS_ERROR * eager + 1e-3
            contestant.found |= {"error": error, "error_allowed": allowed}
        else:
            contestant.found |= {"error": error, "error_allowed": allowed, "without_float32": self._without}
        if contestant.way.variant == "fp8":
            allowed = max(allowed, MOST_FP8_ERROR)
            contestant.found["error_allowed"] = allowed
        if not error <= allowed:
            raise ArithmeticError(f"latents are off by {error:.3g} (relative L2), {allowed:.3g} is allowed")


def _timed(device: Device, deadline: Deadline, task: Task, chosen: Subject, contestants: dict[str, Contestant]) -> Found:
    """Rounds as long as there is time, each way once in a round; the summary is renewed after every round."""
    order = random.Random(0)
    for index in range(1 if task.dry else MOST_ROUNDS):
        start = time.perf_counter()
        for name in order.sample(list(contestants), len(contestants)):
            watch = Stopwatch(device)
            contestants[name].draw(watch, chosen.loop)
            contestants[name].rounds.append(watch.seconds | {"total": sum(watch.seconds.values())})
        for name, contestant in contestants.items():
            contestant.found["seconds"] = summary_of(contestant.rounds)
            contestant.found["rounds"] = index + 1
            for rival in (EAGER, COMPILE):
                if rival in contestants and rival != name:
                    contestant.found[f"over {rival}"] = _ratio(contestants[rival], contestant)
            if chosen.loop < chosen.steps:
                step = contestant.found["seconds"]["denoise"]["median"] / chosen.loop
                contestant.found["step_seconds"] = step
                contestant.found["extrapolated_seconds"] = step * chosen.steps
            yield name, contestant.found
        taken = time.perf_counter() - start
        if deadline.left < 1.2 * taken + 0.5 * KEPT_FOR_ROUNDS * task.budget:
            break


def _ratio(rival: Contestant, own: Contestant) -> float:
    """Median over rounds of the rival's seconds by this one's."""
    return statistics.median(theirs["total"] / ours["total"] for theirs, ours in zip(rival.rounds, own.rounds, strict=True))


def _waits(device: Device, chosen: Subject, contestant: Contestant) -> dict[str, Any]:
    """How long the GPU waits between two steps."""
    if contestant.ours is None:
        return {}
    loaded = contestant.ours.engines["step"]
    engine = loaded.engine
    recorded = Recorded(engine, device)
    loaded.engine = recorded
    try:
        contestant.draw(Stopwatch(device), max(chosen.checked_steps, chosen.loop))
    finally:
        loaded.engine = engine
    return {"idle_between_steps": recorded.idle_share()}


def _kinds(device: Device, chosen: Subject, contestant: Contestant) -> dict[str, Any]:
    """Seconds by kind of kernel over one request of few steps."""
    steps = chosen.checked_steps
    try:
        found = breakdown(device, lambda: contestant.draw(Stopwatch(device), steps))
    except Exception as error:  # a profiler that is refused the device
        return {"breakdown_failed": one_line(error)}
    return {"breakdown": found, "breakdown_steps": steps}
