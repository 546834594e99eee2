"""Runs a scheduler on a basis: one batch row per input it is ever given, so that its outputs *are* its coefficients."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_export.sampler.timesteps import SetTimesteps

Array = NDArray[np.float64]
REPLAY_ROWS = 8


@dataclass(frozen=True)
class Drive:
    """What a scheduler did in one run of E model evaluations.

    Attributes:
        timesteps: `[E]`, as the pipeline hands them to the model.
        init_noise_sigma: what the pipeline multiplies unit noise by.
        input_scale: `[E]`, the model's input divided by the sample.
        response: `[E, 2E]`; row i is the next sample as a combination of all samples (columns 0..E-1) and all predictions
            (columns E..2E-1) the scheduler was given, each fed as an unknown of its own.
        samples: `[E+1, R]`, a true trajectory of random numbers: sample i, as the scheduler itself chained it.
        predictions: `[E, R]`, the random predictions fed along that trajectory.
    """

    timesteps: Array
    init_noise_sigma: float
    input_scale: Array
    response: Array
    samples: Array
    predictions: Array

    @property
    def evaluations(self) -> int:
        return len(self.timesteps)

    @property
    def is_finite(self) -> bool:
        numbers = (self.timesteps, self.input_scale, self.response, self.samples, self.init_noise_sigma)
        return all(bool(np.isfinite(part).all()) for part in numbers)


def drive(scheduler: Any, steps: int, tokens: int | None, set_timesteps: SetTimesteps, seed: int = 0) -> Drive:
    """Runs a copy of `scheduler` for `steps` steps on basis rows and, beside them, on rows of random numbers.

    Unit vectors are exact in float32, to which most schedulers round their input, so the coefficients lose nothing.

    Args:
        scheduler: a diffusers scheduler; it is copied, not touched.
        steps: the step count.
        tokens: latent tokens of a dynamically shifted schedule.
        set_timesteps: how the pipeline sets the timesteps.
        seed: of every generator a stochastic scheduler could draw from. The random rows do not depend on it.
    """
    scheduler = copy.deepcopy(scheduler)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        set_timesteps(scheduler, steps, tokens)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        timesteps = scheduler.timesteps
        count = len(timesteps)
        extra = _step_arguments(scheduler, seed)
        noise = torch.from_numpy(np.random.default_rng(7).standard_normal((count + 1, REPLAY_ROWS)))
        init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        trajectory = [noise[count] * init_noise_sigma * 3]  # wide enough to meet any clipping at 1
        scales, responses = [], []
        for i in range(count):
            sample = torch.zeros(2 * count + REPLAY_ROWS, 1, 1, 1, dtype=torch.float64)
            prediction = torch.zeros_like(sample)
            sample[i], prediction[count + i] = 1, 1
            sample[2 * count :, 0, 0, 0], prediction[2 * count :, 0, 0, 0] = trajectory[-1], noise[i]
            scale = _scaled(scheduler, sample, timesteps[i])[i].item()
            following = scheduler.step(prediction, timesteps[i], sample, return_dict=False, **extra)[0].flatten()
            scales.append(scale)
            responses.append(following[: 2 * count].double().numpy())
            trajectory.append(following[2 * count :].double())
    return Drive(
        timesteps=timesteps.double().numpy(),
        init_noise_sigma=init_noise_sigma,
        input_scale=np.array(scales),
        response=np.stack(responses),
        samples=torch.stack(trajectory).numpy(),
        predictions=noise[:count].numpy(),
    )


def _scaled(scheduler: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The model's input; the flow schedulers of diffusers have no `scale_model_input`."""
    if not hasattr(scheduler, "scale_model_input"):
        return sample
    return scheduler.scale_model_input(sample.clone(), timestep)


def _step_arguments(scheduler: Any, seed: int) -> dict[str, Any]:
    """What pipelines pass to every `step`: eta 0 and a generator, each where it is taken."""
    taken = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in taken:
        arguments["eta"] = 0.0
    if "generator" in taken:
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return arguments
