"""What a build tells of itself when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mc_export.build.progress import State


@dataclass(frozen=True)
class EngineReport:
    """How one engine came about: `cached` or `built`, in how many seconds, how exact and how large.

    `states` are the seconds by state of when it was built, by whatever build that was.
    """

    component: str
    target: str
    precision: str
    state: str
    seconds: float
    max_abs: float
    relative_l2: float
    bytes: int
    states: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the bundle.
        unchanged: the same bundle was there already.
        engines: one report an engine.
        seconds: the whole build.
        bytes: the whole bundle.
    """

    path: Path
    unchanged: bool
    engines: tuple[EngineReport, ...]
    seconds: float
    bytes: int

    @property
    def why(self) -> str:
        """One line: what was built, and what was not and why."""
        built = [engine.component for engine in self.engines if engine.state == State.BUILT]
        cached = [engine.component for engine in self.engines if engine.state == State.CACHED]
        parts = [f"built {', '.join(built)}"] if built else []
        if cached:
            parts.append(f"{', '.join(cached)} unchanged: from the cache")
        return ("the same bundle was there already; " if self.unchanged else "") + "; ".join(parts)
