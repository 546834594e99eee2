"""The loop on a device that is given its next step while the host waits for the last one; a fake one: a queue of launches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends.base import Array, Backend, Buffer, Call, Engine, Settings
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import Cancelled, EngineError
from mc_runtime.runtime.batch import Rows, StepBatch
from mc_runtime.runtime.denoise import denoise
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import EngineClock
from mc_runtime.sampling.tables import Schedule

STEPS = 5


class QueueBackend(Backend):
    """What is launched runs when somebody waits for it, no sooner; `waits` notes how much was left to do after each wait."""

    name, devices = "queue", ("queue",)

    def __init__(self, ahead: int) -> None:
        super().__init__(Settings())
        self.ahead = ahead  # type: ignore[misc]
        self.queue: deque[Callable[[], None]] = deque()
        self.waits: list[int] = []
        self.uploads = 0

    def load(self, component: str, files: tuple[Path, ...], spec: Any) -> Engine:
        return QueueEngine(self)

    def to_device(self, array: Array) -> Buffer:
        buffer = self.empty(array.shape, str(array.dtype))
        self.write(buffer, array)
        return buffer

    def empty(self, shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
        return Buffer(np.full(shape, np.nan, dtype), tuple(shape), np.dtype(dtype))

    def write(self, buffer: Buffer, array: Array) -> None:
        self.uploads += 1
        given = np.array(array)
        self.queue.append(lambda: np.copyto(buffer.native, given))

    def table(self, rows: Array) -> Buffer:
        return self.to_device(rows)

    def select(self, buffer: Buffer, table: Buffer, index: int) -> None:
        self.queue.append(lambda: np.copyto(buffer.native, table.native[index]))

    def to_host(self, buffer: Buffer) -> Array:
        """Waits for everything: what a test may do after the loop, and the loop may not."""
        while self.queue:
            self.queue.popleft()()
        self.waits.append(0)
        return buffer.native.copy()

    def ask_finite(self, buffer: Buffer) -> Callable[[], bool]:
        found: list[bool] = []
        self.queue.append(lambda: found.append(bool(np.isfinite(buffer.native).all())))

        def answer() -> bool:
            while not found:
                self.queue.popleft()()
            self.waits.append(len(self.queue))
            return found[0]

        return answer


class QueueEngine(Engine):
    """`next = a x + t`, and it is launched, not run."""

    def __init__(self, backend: QueueBackend) -> None:
        super().__init__("step", Path("step"))
        self._backend = backend

    def describe(self) -> Any:
        return (), ()

    def run(self, inputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
        return {}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        backend, given, out = (
            self._backend,
            {name: buffer.native for name, buffer in inputs.items()},
            outputs["next_sample"].native,
        )

        class Launch(Call):
            def run(self) -> None:
                backend.queue.append(
                    lambda: np.copyto(out, given["coefficients"][:, 1:2] * given["sample"] + given["timestep"][:, None])
                )

        return Launch()


class Watch:
    """Notes what it hears of, and the latents of that step where it is told to look."""

    def __init__(self, look: bool = False, stop_at: int | None = None) -> None:
        self.look, self.stop_at = look, stop_at
        self.heard: list[float] = []
        self.latents: list[Array] = []

    def before_step(self) -> None:
        if self.stop_at is not None and len(self.heard) >= self.stop_at:
            raise Cancelled("enough")

    def after_step(self, timestep: float, seconds: float, latents: Callable[[], Array]) -> None:
        assert seconds >= 0
        self.heard.append(timestep)
        if self.look:
            self.latents.append(latents())


def run(ahead: int, watch: Watch, timesteps: list[float] | None = None) -> tuple[Array, QueueBackend]:
    backend = QueueBackend(ahead)
    engine = LoadedEngine(SimpleNamespace(precision=Precision.BF16), backend, backend.load("step", (), None))  # type: ignore[arg-type]
    numbers = np.array(timesteps or [5.0, 4, 3, 2, 1], np.float32)
    coefficients = np.stack([np.ones(STEPS), np.linspace(0.5, 1.5, STEPS), np.zeros(STEPS)], axis=1).astype(np.float32)
    schedule = Schedule(numbers, coefficients, 1.0, order=1)
    context = Rows([np.ones((1, 1), np.float32)], (1, 1, 1, 1))
    batch = StepBatch(np.arange(6, dtype=np.float32).reshape(3, 2), None, context, {}, images=2)
    return denoise(engine, batch, schedule, EngineClock(), watch), backend


def expected() -> list[Array]:
    latents, found = np.arange(6, dtype=np.float32).reshape(3, 2), []
    for factor, timestep in zip(np.linspace(0.5, 1.5, STEPS).astype(np.float32), (5.0, 4, 3, 2, 1), strict=True):
        latents = factor * latents + np.float32(timestep)
        found.append(latents[:2])
    return found


@pytest.mark.parametrize("ahead", [0, 1])
def test_latents_do_not_depend_on_how_far_ahead_the_device_is(ahead: int) -> None:
    watch = Watch(look=True)
    latents, _ = run(ahead, watch)
    np.testing.assert_array_equal(latents, expected()[-1])
    assert watch.heard == [5, 4, 3, 2, 1]
    np.testing.assert_array_equal(watch.latents, expected())  # of the step that was heard of, not of the one under way


def test_the_device_has_its_next_step_before_the_host_waits() -> None:
    """Every wait but the last leaves a whole step to do (its two scalars, its run, its question), and nothing is uploaded."""
    watch = Watch()
    _, backend = run(1, watch)
    assert backend.waits == [4] * (STEPS - 1) + [0, 0]
    assert backend.uploads == 4  # all timesteps, all coefficients, the noise, the context
    _, backend = run(0, Watch())
    assert backend.waits == [0] * (STEPS + 1)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_step_that_is_not_finite_is_named_though_another_is_under_way(ahead: int) -> None:
    watch = Watch()
    with pytest.raises(EngineError, match=r"step 3 of 5: .*another precision than bf16"):
        run(ahead, watch, [5.0, 4, float("inf"), 2, 1])
    assert watch.heard == [5, 4]


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_last_step_is_waited_for(ahead: int) -> None:
    with pytest.raises(EngineError, match="step 5 of 5"):
        run(ahead, Watch(), [5.0, 4, 3, 2, float("nan")])


@pytest.mark.parametrize("ahead", [0, 1])
def test_cancelling_stops_before_the_next_step(ahead: int) -> None:
    watch = Watch(stop_at=2)
    with pytest.raises(Cancelled):
        run(ahead, watch)
    assert watch.heard == [5, 4]
