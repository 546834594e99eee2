"""Sampler tables as the runtime reads them, and the noise an image starts from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mc_runtime.errors import BundleError, RequestError
from mc_runtime.sampling import SamplerTable, StepTable, initial_noise
from mc_runtime.sampling.noise import SEED_LIMIT


def step_table(counts: tuple[int, ...] = (1, 2, 3), order: int = 2) -> StepTable:
    rows = sum(counts)
    return StepTable(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        timesteps=np.linspace(999.5, 1, rows),
        coefficients=np.arange(rows * (1 + 2 * order), dtype=np.float64).reshape(rows, -1),
        init_noise_sigma=np.arange(1.0, len(counts) + 1),
    )


def test_a_schedule_is_its_rows(tmp_path: Path) -> None:
    table = SamplerTable("Euler", {"static": step_table()}, {"residual": "1e-8"})
    table.save(tmp_path / "sampler.safetensors")
    loaded = SamplerTable.load(tmp_path / "sampler.safetensors")
    assert (loaded.scheduler, loaded.order, loaded.max_steps, loaded.is_dynamic) == ("Euler", 2, 3, False)
    assert loaded.metadata == {"residual": "1e-8"}
    schedule = loaded.schedule(2, tokens=77)  # a static schedule serves any size
    assert len(schedule) == 2
    assert schedule.order == 2
    assert schedule.init_noise_sigma == 2.0
    assert schedule.timesteps.dtype == schedule.coefficients.dtype == np.float32
    np.testing.assert_array_equal(schedule.timesteps, step_table().timesteps[1:3].astype(np.float32))
    np.testing.assert_array_equal(schedule.coefficients, step_table().coefficients[1:3].astype(np.float32))


def test_two_saves_are_the_same_bytes(tmp_path: Path) -> None:
    table = SamplerTable("Euler", {"256": step_table(), "64": step_table()}, {"b": "1", "a": "2"})
    for name in ("one", "two"):
        table.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("steps", [0, -1, 4, 1000])
def test_step_counts_outside_the_table_are_refused(steps: int) -> None:
    table = SamplerTable("Euler", {"static": step_table()})
    with pytest.raises(RequestError, match=f"steps={steps} is not served; ask for 1 to 3$"):
        table.schedule(steps)


def test_a_step_count_the_scheduler_lacks_names_the_nearest() -> None:
    table = SamplerTable("Euler", {"static": step_table((0, 2, 3))})
    with pytest.raises(RequestError, match="Euler has no schedule of 1 steps; the nearest is 2"):
        table.schedule(1)
    assert len(table.schedule(3)) == 3


@pytest.mark.parametrize("tokens", [None, 100])
def test_token_counts_outside_a_dynamic_table_are_refused(tokens: int | None) -> None:
    table = SamplerTable("Euler", {"1024": step_table(), "256": step_table()})
    assert table.is_dynamic
    assert len(table.schedule(3, 256)) == 3
    with pytest.raises(RequestError, match=f"{tokens} latent tokens are not served, only 256, 1024"):
        table.schedule(3, tokens)


@pytest.mark.parametrize(
    "broken",
    [
        {"offsets": np.array([0, 1, 3, 5])},
        {"offsets": np.array([0, 3, 1, 6])},
        {"offsets": np.array([1, 1, 3, 6])},
        {"offsets": np.array([0])},
        {"timesteps": np.zeros(5)},
        {"coefficients": np.zeros((6, 4))},
        {"coefficients": np.zeros((6, 1))},
        {"coefficients": np.full((6, 5), np.nan)},
        {"timesteps": np.full(6, np.inf)},
        {"init_noise_sigma": np.ones(2)},
    ],
)
def test_arrays_that_do_not_belong_together_are_a_bundle_error(broken: dict[str, Any], tmp_path: Path) -> None:
    arrays = {**vars(step_table()), **broken}
    with pytest.raises(ValueError):
        SamplerTable("Euler", {"static": StepTable(**arrays)})
    path = tmp_path / "sampler.safetensors"
    header = {"format": "mc-runtime-sampler-1", "scheduler": "Euler", "order": 2, "metadata": {}}
    tensors = {f"{name}/static": array for name, array in arrays.items()}
    save_file(tensors, path, metadata={"sampler": json.dumps(header)})
    with pytest.raises(BundleError, match=r"sampler\.safetensors: .*build the bundle again"):
        SamplerTable.load(path)


def test_missing_truncated_and_foreign_files_are_bundle_errors(tmp_path: Path) -> None:
    path = tmp_path / "sampler.safetensors"
    with pytest.raises(BundleError, match="sampler"):
        SamplerTable.load(path)
    SamplerTable("Euler", {"static": step_table()}).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BundleError, match="sampler"):
        SamplerTable.load(path)
    save_file({"x": np.zeros(3)}, path, metadata={"format": "another"})
    with pytest.raises(BundleError, match="not a sampler table of this version"):
        SamplerTable.load(path)


def test_header_of_another_kind_is_a_bundle_error(tmp_path: Path) -> None:
    path = tmp_path / "sampler.safetensors"
    save_file({f"{name}/static": array for name, array in vars(step_table()).items()}, path, {"sampler": "[]"})
    with pytest.raises(BundleError, match="build the bundle again"):
        SamplerTable.load(path)


def test_schedules_are_kept_for_token_counts() -> None:
    with pytest.raises(ValueError, match="numbers of tokens"):
        SamplerTable("Euler", {"many": step_table()})


def test_tables_of_one_bundle_agree() -> None:
    with pytest.raises(ValueError, match="differ"):
        SamplerTable("Euler", {"64": step_table(), "256": step_table(order=1)})
    with pytest.raises(ValueError, match="no schedules"):
        SamplerTable("Euler", {})


def test_noise_is_normal_float32_and_the_same_for_the_same_seed() -> None:
    noise = initial_noise(7, (4, 64, 64))
    assert noise.shape == (4, 64, 64)
    assert noise.dtype == np.float32
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    np.testing.assert_array_equal(noise, initial_noise(np.int64(7), [4, 64, 64]))
    assert not np.array_equal(noise, initial_noise(8, (4, 64, 64)))


def test_noise_is_the_same_on_every_machine() -> None:
    """Pictures are promised to repeat: a change of these bytes is a change of every picture."""
    digest = hashlib.sha256(initial_noise(1234, (2, 3, 5)).tobytes()).hexdigest()
    assert digest == "6a5cc37f0124faba9212b4c1c626eb5793a5329f82ad6ca6d6e4069bfb74d1f2"


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, 2**64, 1.5, "1", None, True, float("nan")])
def test_seeds_out_of_range_are_refused(seed: Any) -> None:
    with pytest.raises(RequestError, match="seed must be an integer from 0 to 9223372036854775807"):
        initial_noise(seed, (1,))


def test_the_largest_seed_serves() -> None:
    assert np.isfinite(initial_noise(SEED_LIMIT - 1, (8,))).all()
