"""The connector's share of a step, canvas in and residual out: operators against the published block, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import weights
from benchmarks.gpu.device import Deadline, Device, one_line
from benchmarks.gpu.kernels import drawing, relative_l2, timed
from benchmarks.gpu.pipelines import Request
from benchmarks.gpu.sections import Found, Task
from benchmarks.gpu.subjects import Subject, subject
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.model.injection import CanvasBackbone
from mc_export.program.step import StepProgram
from mc_export.rewrites.kernels import use_kernels

SUBJECTS = ("sana", "flux-kontext", "wan")
ROUNDS = 15
TIMES_EAGERS_ERROR = 2.0


def measure(task: Task) -> Found:
    """Each of `SUBJECTS` at its own size."""
    torch.set_grad_enabled(False)
    device, deadline = task.open_device(), Deadline(task.budget)
    device.warm_up()
    for name in SUBJECTS:
        if deadline.left < 12 and not task.dry:
            yield name, {"skipped": "no time left in this section"}
            continue
        try:
            yield name, _measured(device, subject(name, task.dry), rounds=1 if task.dry else ROUNDS)
        except Exception as error:  # CUDA, Triton and inductor raise types of their own; the other models go on
            yield name, {"failed": one_line(error)}
        torch._dynamo.reset()
        device.release()


def _measured(device: Device, chosen: Subject, rounds: int) -> dict[str, Any]:
    place = device.torch
    model = weights.drawn(chosen.one_block, place, 1)
    config = model.config
    canvas = weights.drawn(lambda: weights.canvas_model(chosen, config), place, 2)
    published = canvas.canvas_connector
    exact = weights.twin(lambda: weights.canvas_model(chosen, config), canvas, place).canvas_connector.double()
    ours = _ours(chosen, device, model, canvas)

    def eager(tokens: Tensor, plan: Tensor, timestep: Tensor, clean: Tensor | None) -> Tensor:
        return published.residual(tokens, plan, timestep, clean)

    arguments = [_arguments(chosen, config, device, 0)]
    tokens, plan, timestep, clean = arguments[0]
    truth = exact.residual(tokens.double(), plan.double(), timestep, clean)
    found: dict[str, Any] = {"error": relative_l2(ours(*arguments[0]), truth)}
    found["eager_error"] = relative_l2(eager(*arguments[0]), truth)
    del truth, exact
    if not found["error"] <= TIMES_EAGERS_ERROR * found["eager_error"] + 1e-3:
        raise ArithmeticError(f"off by {found['error']:.3g} (relative L2 against float64), eager by {found['eager_error']:.3g}")
    contestants = {"ours": ours, "eager": eager}
    try:
        compiled = device.compiled(eager)
        compiled(*arguments[0])
        contestants["compile"] = compiled
    except Exception as error:  # the baseline's own trouble
        found["compile_failed"] = one_line(error)
    sets = min(8, max(2, -(-4 * device.l2_bytes // (2 * tokens.numel() * tokens.element_size()))))
    arguments += [_arguments(chosen, config, device, seed) for seed in range(1, sets)]
    medians = timed(device, contestants, arguments, rounds)
    launched = sorted(device.seconds(lambda: eager(*arguments[0]), ahead=False) for _ in range(max(3, rounds // 3)))
    return found | {
        "seconds": medians,
        "eager_launched_one_by_one": launched[len(launched) // 2],
        "over": {name: seconds / medians["ours"] for name, seconds in medians.items() if name != "ours"},
    }


def _ours(chosen: Subject, device: Device, model: Any, canvas: Any) -> Callable[..., Tensor]:
    """The connector as the step program has it, with the operators."""
    adapter, config = chosen.adapter, model.config
    twin = weights.twin(chosen.one_block, model, device.torch)
    own = weights.twin(lambda: weights.canvas_model(chosen, config), canvas, device.torch)
    backbone = CanvasBackbone(adapter, twin, own.canvas_connector).eval()
    with device.torch:
        step = StepProgram(backbone, adapter.prepared_context_width(config), keyframes=chosen.grid[0])
        use_kernels(step)
    compute_in_bf16(step).requires_grad_(False).eval().to(device.torch)

    def residual(tokens: Tensor, plan: Tensor, timestep: Tensor, clean: Tensor | None) -> Tensor:
        step.sinusoids.publish([rows.to(tokens.dtype) for rows in step.sinusoids(timestep)])
        connector: Any = step.backbone.connector
        found: Tensor = connector.residual(tokens, plan, timestep, clean)
        return found

    return residual


def _arguments(chosen: Subject, config: Any, device: Device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Patch-embedded latents of all branches, their plans, timesteps, and which frames are clean."""
    adapter, rows = chosen.adapter, chosen.branches
    draw = drawing(device, seed)
    extents = (1, *chosen.latent[1:])[-3:]
    cells = tuple(extent // patch for extent, patch in zip(extents, adapter.patch(config), strict=True))
    width = adapter.width(config)
    told = {
        name: torch.from_numpy(array).to(device.torch).expand(rows, *array.shape[1:])
        for name, array in Request(chosen, config).conditions.items()
    }
    sample = draw(rows, *chosen.latent)
    clean = adapter.clean_frames(sample, **told)
    timestep = torch.full((rows,), 617.5, device=device.torch)
    return draw(rows, *cells, width), draw(rows, *chosen.grid, width), timestep, clean
