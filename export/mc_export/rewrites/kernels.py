"""A step by the operators of `mc_kernels`, for CUDA alone: on a CPU they run their references and make nothing faster.

The backbone's spec says what becomes of its blocks (`Backbone.use_kernels`: one file a backbone beside this one); the canvas
connector's block and the end of the step are the same for all.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from mc_export.program.base import Program
from mc_export.program.step import StepProgram
from mc_export.rewrites.counts import Counts
from mc_export.rewrites.sana import kernel_connector
from mc_kernels.guided_step import guided_step


def use_kernels(program: Program) -> Counts:
    """Puts operators into `program`, in place.

    Returns:
        How often each operator has to occur in its export, so that a block that was not matched shows. Empty for every
        program but the step.

    Raises:
        EngineError: not all of the backbone's blocks were matched, or one is of a kind that no kernel is written for.
    """
    if not isinstance(program, StepProgram):
        return {}
    canvas = program.backbone
    counts = Counter(canvas.backbone.use_kernels(canvas.model))
    if canvas.connector is not None:
        canvas.connector, of_connector = kernel_connector(canvas.connector)
        counts.update(of_connector)
    program.update = update_by_kernel
    counts["guided_step"] += 1
    return dict(counts)


def update_by_kernel(
    prediction: Tensor, guidance: Tensor, coefficients: Tensor, sample: Tensor, history: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """See `mc_export.program.update.guided_update`; predictions are read in the type they have."""
    stepped, remembered = guided_step(prediction.contiguous(), guidance, coefficients, sample, history)
    return stepped, None if history is None else remembered
