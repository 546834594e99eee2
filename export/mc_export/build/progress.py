"""How a build tells what it is doing and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where an engine's build stands."""

    CACHED = "cached"
    LOADING = "loading"
    EXPORTING = "exporting"
    LOWERING = "lowering"
    CALIBRATING = "calibrating"
    QUANTIZING = "quantizing"
    BUILDING = "building"
    VERIFYING = "verifying"
    BUILT = "built"
    WRITING = "writing"


# Shares of an engine's build, roughly as measured; the time left follows from them.
_SHARE = {
    State.LOADING: 1.0,
    State.EXPORTING: 3.0,
    State.LOWERING: 5.0,
    State.CALIBRATING: 4.0,
    State.QUANTIZING: 8.0,
    State.BUILDING: 5.0,
    State.VERIFYING: 2.0,
}
_QUANTIZED = (State.CALIBRATING, State.QUANTIZING)
_PLANNED = (State.BUILDING,)
BUNDLE = "bundle"


@dataclass(frozen=True)
class BuildEvent:
    """One change of state.

    Attributes:
        component: an engine's component, or `bundle` for what is not an engine.
        state: what is done to it now.
        done, total: shares of the whole build.
        seconds: since the build began.
        seconds_left: an estimate, or None before there is anything to base one on.
    """

    component: str
    state: State
    done: float
    total: float
    seconds: float
    seconds_left: float | None

    def __str__(self) -> str:
        return f"{self.component}: {self.state}"


ProgressCallback = Callable[[BuildEvent], None]


class StateClock:
    """Hears of every state an engine enters, passes it on, and knows how long each lasted."""

    def __init__(self, enter: Callable[[State], None]) -> None:
        self._enter = enter
        self._entered: list[tuple[State, float]] = []

    def enter(self, state: State) -> None:
        """The engine enters a state."""
        self._entered.append((state, time.monotonic()))
        self._enter(state)

    def seconds(self) -> dict[str, float]:
        """By state, up to now."""
        ends = [begun for _, begun in self._entered[1:]] + [time.monotonic()]
        found: dict[str, float] = {}
        for (state, begun), end in zip(self._entered, ends, strict=True):
            found[state.value] = round(found.get(state.value, 0.0) + end - begun, 2)
        return found


class ProgressLog:
    """Counts the shares of a build and tells the callback of each change.

    Args:
        callback: told of every event; None for nobody.
        components: the engines, each with whether it is quantized, and whether a library builds it and tells how far it is.
    """

    def __init__(self, callback: ProgressCallback | None, components: Sequence[tuple[str, bool, bool]]) -> None:
        self._callback = callback
        self._start = time.monotonic()
        self._todo = {
            component: {
                state: share
                for state, share in _SHARE.items()
                if (quantized or state not in _QUANTIZED) and (planned or state not in _PLANNED)
            }
            for component, quantized, planned in components
        }
        self._total = sum(sum(shares.values()) for shares in self._todo.values()) + 1.0
        self._saved = 0.0
        self._done = 0.0
        self._current: tuple[str, State] | None = None

    def enter(self, component: str, state: State) -> None:
        """A component enters a state: the one before it is done, and those between them were not needed."""
        if self._current is not None:
            previous, before = self._current
            self._done += self._todo.get(previous, {}).pop(before, 0.0)
        self._current = (component, state)
        shares = self._todo.get(component, {})
        for skipped in [each for each in shares if state not in shares or each is not state]:
            if state in shares and list(shares).index(skipped) > list(shares).index(state):
                break
            self._saved += shares.pop(skipped)
        self._tell(component, state)

    def within(self, share: float) -> None:
        """So much of the current state is done, from 0 to 1."""
        if self._current is not None:
            component, state = self._current
            self._tell(component, state, share * self._todo.get(component, {}).get(state, 0.0))

    def _tell(self, component: str, state: State, more: float = 0.0) -> None:
        if self._callback is None:
            return
        total, done = self._total - self._saved, self._done + more
        seconds = time.monotonic() - self._start
        left = seconds * (total - done) / done if done else None
        self._callback(BuildEvent(component, state, done, total, seconds, left))
