"""The sampler of a bundle: the coefficients of every step of every step count it serves, read from one file.

`x[i+1] = sum_k a_k x[i-k] + sum_k b_k v[i-k]`, `k < order`, with samples x and the model's predictions v. The model is given
`input_scale * x[i]`. The file is written at build time from the checkpoint's own diffusers scheduler (`mc_export.sampler`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mc_runtime.errors import BundleError, RequestError

FORMAT = "mc-runtime-sampler-2"
STATIC = "static"


@dataclass(frozen=True)
class Schedule:
    """One request's way from noise to picture.

    Attributes:
        timesteps: f32 `[n]`, as the step engine takes them. `n` is the number of model evaluations: the step count, or one
            more with PNDM.
        coefficients: f32 `[n, 1 + 2*order]` = `[input_scale, a_0.., b_0..]`.
        init_noise_sigma: what unit noise is multiplied by.
        order: how many samples, and as many predictions, a step needs.
    """

    timesteps: NDArray[np.float32]
    coefficients: NDArray[np.float32]
    init_noise_sigma: float
    order: int

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class StepTable:
    """The schedules of all step counts 1..max_steps, one after another.

    Attributes:
        offsets: i64 `[max_steps + 1]`; steps n lies in rows `offsets[n-1]:offsets[n]`, none where the scheduler cannot do n.
        timesteps: f64 `[rows]`.
        coefficients: f64 `[rows, 1 + 2*order]`.
        init_noise_sigma: f64 `[max_steps]`.
    """

    offsets: NDArray[np.int64]
    timesteps: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    init_noise_sigma: NDArray[np.float64]

    @property
    def max_steps(self) -> int:
        return len(self.offsets) - 1

    @property
    def order(self) -> int:
        return (int(self.coefficients.shape[1]) - 1) // 2

    @property
    def served(self) -> list[int]:
        """The step counts that have rows."""
        return [int(n) + 1 for n in np.flatnonzero(np.diff(self.offsets) > 0)]

    def validate(self) -> None:
        """Checks that the four arrays belong together and are finite.

        Raises:
            ValueError: they do not.
        """
        rows = len(self.timesteps)
        if self.timesteps.shape != (rows,) or self.coefficients.ndim != 2 or len(self.coefficients) != rows:
            raise ValueError("timesteps and coefficients do not match")
        if self.order < 1 or self.coefficients.shape[1] != 1 + 2 * self.order:
            raise ValueError("coefficients have an even number of columns")
        bounds = self.offsets
        if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != rows or (np.diff(bounds) < 0).any():
            raise ValueError("offsets do not cover the rows")
        if self.init_noise_sigma.shape != (self.max_steps,):
            raise ValueError("init_noise_sigma does not match the step counts")
        if not all(np.isfinite(a).all() for a in (self.timesteps, self.coefficients, self.init_noise_sigma)):
            raise ValueError("a number is not finite")


@dataclass(frozen=True)
class SamplerTable:
    """All step tables of a bundle, by key: "static", or the number of latent tokens where the schedule depends on it.

    Attributes:
        scheduler: class name of the diffusers scheduler it was made from.
        tables: the step tables; all of one order.
        metadata: further facts kept in the file, such as the measured residual.
        interpolates: whether the token counts are nodes of a polynomial that serves all counts between the first and the last.
    """

    scheduler: str
    tables: Mapping[str, StepTable]
    metadata: Mapping[str, str] = field(default_factory=dict)
    interpolates: bool = False

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("a sampler table has no schedules")
        if set(self.tables) != {STATIC} and not all(key.isdecimal() for key in self.tables):
            raise ValueError(f"schedules are kept for {STATIC!r} or for numbers of tokens, found {sorted(self.tables)}")
        for table in self.tables.values():
            table.validate()
        if len({(table.order, table.max_steps) for table in self.tables.values()}) != 1:
            raise ValueError("tables differ in order or step counts")
        if self.interpolates and len({table.offsets.tobytes() for table in self.tables.values()}) != 1:
            raise ValueError("tables differ in their steps; nothing lies between them")

    @property
    def order(self) -> int:
        return next(iter(self.tables.values())).order

    @property
    def max_steps(self) -> int:
        return next(iter(self.tables.values())).max_steps

    @property
    def served(self) -> list[int]:
        """The step counts it has schedules of."""
        return next(iter(self.tables.values())).served

    @property
    def is_dynamic(self) -> bool:
        """Whether a schedule depends on the number of latent tokens."""
        return STATIC not in self.tables

    def schedule(self, steps: int, tokens: int | None = None) -> Schedule:
        """The schedule of `steps` steps; `tokens`, the latent tokens after patchify, matters only to a dynamic table.

        Raises:
            RequestError: this step count or token count is not in the table; the message says what is.
        """
        weights = self._weights(tokens)
        table = self.tables[next(iter(weights))]
        if not 1 <= steps <= table.max_steps:
            raise RequestError(f"steps={steps} is not served; ask for 1 to {table.max_steps}")
        if steps not in table.served:
            nearest = min(table.served, key=lambda count: abs(count - steps))
            raise RequestError(f"{self.scheduler} has no schedule of {steps} steps; the nearest is {nearest}")
        rows = slice(int(table.offsets[steps - 1]), int(table.offsets[steps]))
        return Schedule(
            timesteps=_weighed(weights, {key: self.tables[key].timesteps[rows] for key in weights}),
            coefficients=_weighed(weights, {key: self.tables[key].coefficients[rows] for key in weights}),
            init_noise_sigma=sum(self.tables[key].init_noise_sigma[steps - 1] * weight for key, weight in weights.items()),
            order=table.order,
        )

    def _weights(self, tokens: int | None) -> dict[str, float]:
        """What each table counts: one alone, or the nodes of a polynomial, by the barycentric formula."""
        if not self.is_dynamic:
            return {STATIC: 1.0}
        if str(tokens) in self.tables:
            return {str(tokens): 1.0}
        keys = sorted(self.tables, key=int)
        nodes = np.array([int(key) for key in keys], np.float64)
        if tokens is None or not self.interpolates or not nodes[0] < tokens < nodes[-1]:
            counts = f"those from {keys[0]} to {keys[-1]}" if self.interpolates else ", ".join(keys)
            raise RequestError(
                f"the schedule depends on the picture's size: {tokens} latent tokens are not served, only {counts}; "
                "choose one of the bundle's sizes, or build it with this one"
            )
        distances = (nodes[:, None] - nodes) * (4 / (nodes[-1] - nodes[0]))  # so scaled, their products stay near 1
        np.fill_diagonal(distances, 1)
        weights = 1 / (distances.prod(axis=1) * (tokens - nodes))
        return dict(zip(keys, (weights / weights.sum()).tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Writes the table as one safetensors file."""
        arrays: dict[str, NDArray[np.float64] | NDArray[np.int64]] = {}
        for key, table in self.tables.items():
            arrays[f"offsets/{key}"] = np.ascontiguousarray(table.offsets)
            arrays[f"timesteps/{key}"] = np.ascontiguousarray(table.timesteps)
            arrays[f"coefficients/{key}"] = np.ascontiguousarray(table.coefficients)
            arrays[f"init_noise_sigma/{key}"] = np.ascontiguousarray(table.init_noise_sigma)
        header = {"format": FORMAT, "scheduler": self.scheduler, "order": self.order, "metadata": dict(self.metadata)}
        header["interpolates"] = self.interpolates
        # One key: safetensors writes several in any order, and equal tables must be equal bytes.
        save_file(arrays, path, metadata={"sampler": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> SamplerTable:
        """Reads what `save` wrote.

        Raises:
            BundleError: the file is missing, damaged or of another format.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("sampler", "{}"))
                if not isinstance(header, dict) or header.get("format") != FORMAT:
                    raise BundleError(f"{path}: not a sampler table of this version; build the bundle again")
                keys = [name.partition("/")[2] for name in file.keys() if name.startswith("offsets/")]  # noqa: SIM118
                tables = {
                    key: StepTable(
                        offsets=file.get_tensor(f"offsets/{key}"),
                        timesteps=file.get_tensor(f"timesteps/{key}"),
                        coefficients=file.get_tensor(f"coefficients/{key}"),
                        init_noise_sigma=file.get_tensor(f"init_noise_sigma/{key}"),
                    )
                    for key in keys
                }
            return cls(header["scheduler"], tables, header["metadata"], header["interpolates"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path}: the sampler table cannot be read ({error}); build the bundle again") from error


def _weighed(weights: Mapping[str, float], rows: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
    total: NDArray[np.float64] = np.sum([weight * rows[key] for key, weight in weights.items()], axis=0)
    return total.astype(np.float32)
