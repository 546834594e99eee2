"""How exact an int8 engine has to be, which of its inputs it is measured on, and what the manifest hears of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_export.lower import Calibration
from mc_export.quantize.sensitivity import Selection
from mc_runtime.errors import EngineError

#: Relative L2 error of an engine's outputs up to which nothing more is kept in float32. A step's is that of its guided
#: prediction: guidance multiplies the error of the branches (by 5.7 at scale 4.5), but not the prediction, which they share.
GATE = {"vision": 0.05, "planner": 0.05, "text_encoder": 0.05, "step": 0.10, "vae_decoder": 0.05, "vae_encoder": 0.05}
GATE |= {"step_first": 0.10, "step_rest": 0.10}  # of whichever is worst: prediction, hidden states, change, residual
GATE |= {"vae_decoder_next": 0.05, "vae_encoder_next": 0.05, "image_encoder": 0.05}
_EVERY = 4


class Feeds(NamedTuple):
    """Inputs to calibrate on, and others to measure on."""

    calibration: Calibration
    held_out: Calibration


def split(inputs: Calibration, component: str) -> Feeds:
    """Every fourth for measuring; a single one serves both.

    Raises:
        EngineError: there are none.
    """
    if not inputs:
        raise EngineError(f"{component}: int8 needs inputs to calibrate on, and there are none")
    held_out = [_measurable(feed) for feed in inputs[_EVERY // 2 :: _EVERY] or inputs[:1]]
    calibration = [feed for index, feed in enumerate(inputs) if index % _EVERY != _EVERY // 2] or inputs
    return Feeds(calibration, held_out)


def _measurable(feed: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """A step's inputs with coefficients that make the prediction its result: in the next sample, which is mostly the last one,
    the prediction's error would hardly show."""
    if "coefficients" not in feed:
        return feed
    coefficients = np.zeros_like(feed["coefficients"])
    coefficients[:, 0] = feed["coefficients"][:, 0]
    coefficients[:, 1 + (coefficients.shape[1] - 1) // 2] = 1
    return {**feed, "coefficients": coefficients}


def described(selection: Selection, calibrated_on: int) -> dict[str, Any]:
    """The engine's options for the manifest."""
    return {
        "calibrated_on": calibrated_on,
        "kept_fp32": list(selection.kept),
        "kept_fp32_work": round(selection.kept_work, 4),
        "held_out_error": float(f"{selection.error:.3g}"),
        "held_out_error_all_int8": float(f"{selection.error_of_all:.3g}"),
    }
