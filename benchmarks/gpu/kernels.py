"""Each kernel: checked against float64 first, then timed against eager PyTorch and `torch.compile`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import copy_rate
from benchmarks.gpu.device import Deadline, Device, one_line
from benchmarks.gpu.kernel_cases import Case, cases, touched_bytes, values_of
from benchmarks.gpu.sections import Found, Task

ROUNDS = 21
MOST_SETS = 48
EAGER_ERROR = 0.05  # a bfloat16 model rounds many times on the way; more than this is another formula


def measure(task: Task) -> Found:
    """All cases; one that has no time left, or fails, says so and leaves the others."""
    torch.set_grad_enabled(False)
    device, deadline = task.open_device(), Deadline(task.budget)
    device.warm_up()
    ceiling = copy_rate(device, 1 << (14 if task.dry else 30))
    for case in cases(task.dry):
        if deadline.left < 4 and not task.dry:
            yield case.name, {"skipped": "no time left in this section"}
            continue
        try:
            yield case.name, _measured(device, case, ceiling, rounds=1 if task.dry else ROUNDS)
        except Exception as error:  # CUDA, Triton and inductor raise types of their own; the other cases go on
            yield case.name, {"failed": one_line(error)}
        torch._dynamo.reset()
        device.release()


def drawing(device: Device, seed: int) -> Callable[..., Tensor]:
    """Standard normal numbers, other ones for every set of inputs."""
    generator = torch.Generator(device.torch).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device.torch) * scale).to(dtype)

    return draw


def relative_l2(found: Tensor, reference: Tensor) -> float:
    """In float64; NaN where a number is not finite."""
    difference = (found.double() - reference.double()).norm() / reference.double().norm()
    return float(difference)


def checked(case: Case, arguments: tuple[Any, ...], operation: Callable[..., Any], tolerance: float) -> float:
    """The largest relative L2 of the outputs against float64. Raises ArithmeticError where it passes `tolerance`."""
    doubles = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    references = values_of(case.reference(*doubles))
    outputs = values_of(operation(*arguments))
    errors = [relative_l2(output, reference) for output, reference in zip(outputs, references, strict=True)]
    if not all(error <= tolerance for error in errors):
        raise ArithmeticError(f"relative L2 {', '.join(f'{error:.2e}' for error in errors)} where {tolerance:.2e} is allowed")
    return max(errors)


def _measured(device: Device, case: Case, ceiling: float, rounds: int) -> dict[str, Any]:
    first = case.inputs(drawing(device, 0))
    found: dict[str, Any] = {"error": checked(case, first, case.operation, case.tolerance)}
    contestants = {"ours": case.operation, "eager": case.eager}
    found["eager_error"] = checked(case, first, case.eager, EAGER_ERROR + case.tolerance)
    try:
        compiled = device.compiled(case.eager)
        checked(case, first, compiled, EAGER_ERROR + case.tolerance)
        contestants["compile"] = compiled
    except Exception as error:  # the baseline's own trouble is no reason to leave the kernel untimed
        found["compile_failed"] = one_line(error)
    moved = touched_bytes(first) + touched_bytes(case.operation(*first))
    # So many different sets that a set has left the cache when its turn comes again.
    sets = min(MOST_SETS, max(2, -(-4 * device.l2_bytes // moved)))
    arguments = [first, *(case.inputs(drawing(device, seed)) for seed in range(1, sets))]
    medians = timed(device, contestants, arguments, rounds)
    same_size = copy_rate(device, moved // 2, sets)
    rate = moved / medians["ours"]
    shares = {"share_of_copy": rate / ceiling} if case.memory_bound else {}
    return found | shares | {
        "seconds": medians, "bytes": moved, "bytes_per_second": rate, "memory_bound": case.memory_bound,
        "share_of_copy_of_same_size": rate / same_size, "sets": sets,
        "over": {name: seconds / medians["ours"] for name, seconds in medians.items() if name != "ours"},
    }  # fmt: skip


def timed(
    device: Device, contestants: dict[str, Callable[..., Any]], arguments: list[tuple[Any, ...]], rounds: int
) -> dict[str, float]:
    """Median seconds of one call: all sets of arguments in one graph, so that gaps between launches are the device's own."""
    kept: list[Any] = []  # outputs of every set live until the graph is gone, or all would be written to the same memory

    def all_sets(operation: Callable[..., Any]) -> Callable[[], None]:
        def launches() -> None:
            outputs = [operation(*each) for each in arguments]
            if device.is_cuda and torch.cuda.is_current_stream_capturing():
                kept.append(outputs)

        return launches

    replays = {name: device.captured(all_sets(operation)) for name, operation in contestants.items()}
    seconds = device.interleaved(replays, rounds)
    return {name: statistics.median(times) / len(arguments) for name, times in seconds.items()}
