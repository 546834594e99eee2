"""Sampler tables against diffusers' own loops: the same pictures from a nonlinear model, for every scheduler and step count.

Tolerances, relative to the largest sample of the trajectory. Replay in float64 against the scheduler in float64: 1e-6 (most
schedulers round the sample to float32 at every step, and a model amplifies it). Replay in float32 against the scheduler in
float32, as pipelines run it: 3e-6. Twice that at the final sample, relative to its own size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mc_export.sampler import UnsupportedSchedulerError, build_sampler_table, dynamic_shift_timesteps, token_nodes
from mc_export.sampler.timesteps import SetTimesteps, plain_timesteps, shift_of_tokens
from mc_runtime.errors import CheckpointError, RequestError
from mc_runtime.sampling import SamplerTable, Schedule

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SANA_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
STEP_COUNTS = (1, 2, 3, 5, 20, 50, 100)
WHOLE = ("flow-euler", "dpm++-2m-sana", "unipc-2-sana")
"""Tabled at every step count up to 100; the others at the ones compared."""

Multistep, UniPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
Euler, FlowEuler = diffusers.EulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler

SCHEDULERS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "flow-euler": (FlowEuler, {"shift": 3.0}, 1),
    "flow-euler-karras": (FlowEuler, {"use_karras_sigmas": True}, 1),
    "dpm++-2m-sana": (Multistep, {**SANA_FLOW}, 2),
    "dpm++-3m-sana": (Multistep, {**SANA_FLOW, "solver_order": 3}, 3),
    "dpm++-2m-epsilon": (Multistep, {**VP}, 2),
    "dpm++-3m-epsilon": (Multistep, {**VP, "solver_order": 3}, 3),
    "dpm++-2m-v": (Multistep, {**VP, "prediction_type": "v_prediction"}, 2),
    "dpm++-2m-karras": (Multistep, {**VP, "use_karras_sigmas": True}, 2),
    "dpm++-2m-heun": (Multistep, {**VP, "solver_type": "heun"}, 2),
    "dpm++-2m-full-order": (Multistep, {**VP, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, 2),
    "dpm++-3m-euler-at-final": (Multistep, {**SANA_FLOW, "solver_order": 3, "euler_at_final": True}, 3),
    "unipc-2-sana": (UniPC, {**SANA_FLOW}, 3),
    "unipc-3-sana": (UniPC, {**SANA_FLOW, "solver_order": 3}, 4),
    "unipc-2-epsilon": (UniPC, {**VP}, 3),
    "unipc-3-v": (UniPC, {**VP, "prediction_type": "v_prediction", "solver_order": 3}, 4),
    "euler-epsilon": (Euler, {**VP}, 1),
    "euler-v": (Euler, {**VP, "prediction_type": "v_prediction"}, 1),
    "euler-karras": (Euler, {**VP, "use_karras_sigmas": True}, 1),
    "euler-trailing": (Euler, {**VP, "timestep_spacing": "trailing"}, 1),
    "ddim-epsilon": (diffusers.DDIMScheduler, {**VP, "clip_sample": False}, 1),
    "ddim-v": (diffusers.DDIMScheduler, {**VP, "clip_sample": False, "prediction_type": "v_prediction"}, 1),
    "pndm": (diffusers.PNDMScheduler, {**VP, "skip_prk_steps": True}, 4),
    "deis": (diffusers.DEISMultistepScheduler, {**VP}, 2),
}  # fmt: skip
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, VP, "is stochastic"),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, "is stochastic"),
    "sde-dpm++": (Multistep, {"algorithm_type": "sde-dpmsolver++"}, "is stochastic"),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}, "is stochastic"),
    "flow-euler-stochastic": (FlowEuler, {"stochastic_sampling": True}, '"stochastic_sampling"'),
    "heun": (diffusers.HeunDiscreteScheduler, {}, "evaluates the model 9 times in 5 steps"),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}, "evaluates the model 9 times in 5 steps"),
    "flow-heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}, "evaluates the model 9 times in 5 steps"),
    "pndm-runge-kutta": (diffusers.PNDMScheduler, {}, "evaluates the model 14 times in 5 steps"),
    "scm": (diffusers.SCMScheduler, {}, "cannot be driven"),
    "ddim-clipped": (diffusers.DDIMScheduler, {}, '"clip_sample"'),
    "thresholding": (Multistep, {"thresholding": True}, '"thresholding"'),
    "dynamic-without-mu": (FlowEuler, {"use_dynamic_shifting": True}, "`mu` must be passed"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model(x: np.ndarray, timestep: float) -> np.ndarray:
    """A nonlinear stand-in for a denoiser, bounded, different at every timestep; keeps the dtype of `x`."""
    mixing = np.random.default_rng(3).standard_normal((x.shape[-1], x.shape[-1])) / np.sqrt(x.shape[-1])
    angle = x @ mixing.astype(x.dtype) + x.dtype.type(timestep / 700)
    return np.tanh(angle) - x.dtype.type(0.3) * np.sin(angle)


def own_loop(scheduler: Any, steps: int, tokens: int | None, hook: SetTimesteps, noise: np.ndarray) -> np.ndarray:
    """The trajectory `[evaluations + 1, *noise.shape]` of the scheduler as pipelines run it."""
    scheduler = copy.deepcopy(scheduler)
    hook(scheduler, steps, tokens)
    x = torch.from_numpy(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    trajectory = [x]
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        prediction = torch.from_numpy(model(scaled.to(x.dtype).numpy(), float(timestep)))
        x = scheduler.step(prediction, timestep, x, return_dict=False)[0].to(x.dtype)
        trajectory.append(x)
    return torch.stack(trajectory).numpy()


def replay(schedule: Schedule, noise: np.ndarray, coefficients: np.ndarray | None = None) -> np.ndarray:
    """The same by the table, in the dtype of `noise`."""
    dtype, order = noise.dtype.type, schedule.order
    table = (schedule.coefficients if coefficients is None else coefficients).astype(noise.dtype)
    samples, predictions = [noise * dtype(schedule.init_noise_sigma)], []
    for (scale, *weights), timestep in zip(table, schedule.timesteps, strict=True):
        predictions.append(model(scale * samples[-1], float(timestep)))
        following = np.zeros_like(noise)
        for k in range(min(order, len(samples))):
            following = following + weights[k] * samples[-1 - k]
        for k in range(min(order, len(predictions))):
            following = following + weights[order + k] * predictions[-1 - k]
        samples.append(following)
    return np.stack(samples)


def check_parity(scheduler: Any, table: SamplerTable, steps: int, tokens: int | None, hook: SetTimesteps) -> None:
    schedule = table.schedule(steps, tokens)
    step_table = table.tables["static" if tokens is None else str(tokens)]
    rows = slice(step_table.offsets[steps - 1], step_table.offsets[steps])
    for dtype, tolerance, coefficients in (
        (np.float64, 1e-6, step_table.coefficients[rows]),
        (np.float32, 3e-6, None),
    ):
        noise = np.random.default_rng(steps).standard_normal((2, 3, 8)).astype(dtype)
        expected = own_loop(scheduler, steps, tokens, hook, noise)
        got = replay(schedule, noise, coefficients)
        assert got.shape == expected.shape
        error = np.abs(got - expected)
        worst = error.max() / np.abs(expected).max()
        assert worst <= tolerance, f"{steps} steps, {np.dtype(dtype)}: max {worst:.2e}, mean {error.mean():.2e}"
        last = error[-1].max() / np.abs(expected[-1]).max()
        assert last <= 2 * tolerance, f"{steps} steps, {np.dtype(dtype)}: final sample {last:.2e}"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_table_replays_the_schedulers_own_loop(name: str, tmp_path: Path) -> None:
    kind, config, order = SCHEDULERS[name]
    scheduler = kind(**config)
    before = dict(vars(scheduler))
    table = build_sampler_table(scheduler, step_counts=None if name in WHOLE else STEP_COUNTS)
    assert vars(scheduler).keys() == before.keys()
    assert table.scheduler == kind.__name__
    assert table.order == order
    assert float(table.metadata["residual"]) < 1e-6
    table.save(tmp_path / "sampler.safetensors")
    table = SamplerTable.load(tmp_path / "sampler.safetensors")
    assert table.tables["static"].served == (list(range(1, 101)) if name in WHOLE else list(STEP_COUNTS))
    for steps in STEP_COUNTS:
        check_parity(scheduler, table, steps, None, plain_timesteps)


def test_dynamic_shift_has_a_table_for_every_token_count() -> None:
    scheduler = FlowEuler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    counts = (256, 1024, 4096)
    table = build_sampler_table(scheduler, max_steps=50, token_counts=counts, set_timesteps=dynamic_shift_timesteps)
    assert table.is_dynamic
    for tokens in counts:
        for steps in (1, 4, 28, 50):
            check_parity(scheduler, table, steps, tokens, dynamic_shift_timesteps)
    starts = [table.schedule(28, tokens).timesteps[14] for tokens in counts]
    assert starts[0] < starts[1] < starts[2]


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
def test_a_dynamic_shift_is_interpolated_between_nodes(shift_type: str, tmp_path: Path) -> None:
    """At any token count, to the rounding of float32, over FLUX's whole range of sizes."""
    scheduler = FlowEuler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, time_shift_type=shift_type)

    def table_of(counts: Sequence[int], **options: Any) -> SamplerTable:
        hook = dynamic_shift_timesteps
        return build_sampler_table(
            scheduler, max_steps=28, step_counts=(1, 14, 28), token_counts=counts, set_timesteps=hook, **options
        )

    nodes = token_nodes(table_of, 4, 256 * 256)
    assert nodes is not None
    assert (nodes[0], nodes[-1]) == (4, 256 * 256)
    assert len(nodes) <= 65
    table_of(nodes, interpolates=True).save(tmp_path / "table")
    table = SamplerTable.load(tmp_path / "table")
    counts = (5, 63 * 64, 64 * 64, 1000, 40_000, 65_535)
    exact = table_of(counts)
    for tokens in counts:
        for steps in (1, 14, 28):
            found, true = table.schedule(steps, tokens), exact.schedule(steps, tokens)
            np.testing.assert_allclose(found.coefficients, true.coefficients, atol=1e-6)
            np.testing.assert_allclose(found.timesteps, true.timesteps, atol=1e-3)
    with pytest.raises(RequestError, match="only those from 4 to 65536"):
        table.schedule(28, 65_537)


def test_rounded_timesteps_are_not_interpolated() -> None:
    scheduler = UniPC(**SANA_FLOW, use_dynamic_shifting=True)

    def table_of(counts: Sequence[int]) -> SamplerTable:
        hook = dynamic_shift_timesteps
        return build_sampler_table(scheduler, max_steps=5, step_counts=(5,), token_counts=counts, set_timesteps=hook)

    assert token_nodes(table_of, 4, 4096) is None


def test_dynamic_shift_is_that_of_the_flux_pipeline() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    for tokens in (100, 256, 1024, 4096, 5000):
        assert shift_of_tokens(config, tokens) == pytest.approx(calculate_shift(tokens), abs=1e-12)
    with pytest.raises(ValueError, match="token_counts"):
        dynamic_shift_timesteps(FlowEuler(use_dynamic_shifting=True), 4, None)


@pytest.mark.parametrize("name", REFUSED)
def test_unsuitable_schedulers_are_refused_by_name(name: str) -> None:
    kind, config, reason = REFUSED[name]
    with pytest.raises(UnsupportedSchedulerError) as caught:
        build_sampler_table(kind(**config), max_steps=6)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError)
    assert message.startswith(kind.__name__)
    assert reason in message
    assert "\n" not in message


class _Bent(FlowEuler):
    """Euler with a step that is not linear in the prediction."""

    def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(model_output.tanh(), *args, **kwargs)


class _Offset(FlowEuler):
    """Euler that adds a constant, as a stochastic scheduler with a fixed seed would."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return (super().step(*args, **kwargs)[0] + 1e-3,)


class _Remembering(FlowEuler):
    """A scheduler whose step needs the prediction of seven steps ago."""

    def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), model_output]
        return super().step(model_output + 0.1 * self.seen[max(0, len(self.seen) - 8)], *args, **kwargs)


@pytest.mark.parametrize("kind", [_Bent, _Offset, _Remembering])
def test_a_scheduler_that_is_no_short_linear_rule_is_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedSchedulerError, match=f"^{kind.__name__} is not .*linear"):
        build_sampler_table(kind(), max_steps=12)


def test_step_counts_the_scheduler_cannot_do_are_left_out() -> None:
    scheduler = FlowEuler(shift_terminal=0.1)  # one step: 0 / 0
    table = build_sampler_table(scheduler, max_steps=4)
    assert table.tables["static"].served == [2, 3, 4]
    check_parity(scheduler, table, 3, None, plain_timesteps)


def test_timestep_scale_multiplies_timesteps_alone() -> None:
    plain = build_sampler_table(FlowEuler(), max_steps=3)
    scaled = build_sampler_table(FlowEuler(), max_steps=3, timestep_scale=0.001)
    np.testing.assert_allclose(scaled.schedule(3).timesteps, plain.schedule(3).timesteps * 0.001, rtol=1e-6)
    np.testing.assert_array_equal(scaled.schedule(3).coefficients, plain.schedule(3).coefficients)


def test_max_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="max_steps"):
        build_sampler_table(FlowEuler(), max_steps=0)
