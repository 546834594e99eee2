"""What the parts of a step are calibrated on: what a whole one is given in requests, and what its first block makes of it."""

from __future__ import annotations

import numpy as np
import torch

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import Calibration
from mc_export.program.base import shape_of
from mc_export.program.cut_step import FirstStepProgram, RestStepProgram
from mc_runtime.bundle.dimensions import extents_in
from mc_runtime.bundle.engines import STEP_FIRST
from mc_runtime.bundle.manifest import Component

_KEPT = ("kept_change", "kept_residual")


@torch.inference_mode()
def cut_step_inputs(checkpoint: Checkpoint, steps: Calibration, component: Component) -> Calibration:
    """Inputs of `step_first` or `step_rest` where a whole step has those of `steps`.

    The residual that is kept is the step's own. What belongs to it is the step's own change with its sign turned, so that
    `difference` is 2 and its error that of the change, not of the small difference between two.
    """
    canvas = None if checkpoint.is_stock else checkpoint.load_canvas()
    width = checkpoint.backbone.prepared_context_width(checkpoint.model_config)
    order = steps[0]["coefficients"].shape[1] // 2
    first = FirstStepProgram(checkpoint.load_backbone(canvas), width, order=order).eval()
    rest = RestStepProgram(checkpoint.load_backbone(None), width, order=order).eval()
    part = first if component == STEP_FIRST else rest
    found: Calibration = []
    for feed in steps:
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        sizes: dict[str, int] = {}
        for spec in first.inputs:
            sizes |= extents_in(spec.shape, given[spec.name].shape) if spec.name in given else {}
        given |= {spec.name: torch.zeros(shape_of(spec, sizes)) for spec in first.inputs if spec.name in _KEPT}
        given |= first.run({spec.name: given[spec.name] for spec in first.inputs})
        given["keep"] = torch.zeros(len(given["sample"]))
        residual = rest.run({spec.name: given[spec.name] for spec in rest.inputs})["next_residual"]
        given |= {"kept_change": -given["change"], "kept_residual": residual}
        own = {spec.name: np.ascontiguousarray(given[spec.name].numpy()) for spec in part.inputs}
        found.append({name: feed.get(name, array) for name, array in own.items()})
    return found
