"""The sections of a run, in their order, with the time each may take; what one is given and gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # whoever only starts sections needs no torch
    from benchmarks.gpu.device import Device

# The two baselines, by their names in reports.
EAGER, COMPILE = "torch eager bf16", "torch compile bf16"

Found = Iterator[tuple[str, dict[str, Any]]]
"""Parts of a result as they are done: a name and JSON-ready values; a name met again replaces what was there."""


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: in the report and for `--sections`.
        module: of this package; its `measure(task)` yields what it finds.
        title: in tables.
        least: seconds below which it is not started.
        most: seconds it gets where there is time enough and another section follows.
    """

    name: str
    module: str
    title: str
    least: float
    most: float


@dataclass(frozen=True)
class Task:
    """What a section is asked to do.

    Attributes:
        section: its name.
        budget: seconds, from now.
        dry: on the CPU at tiny sizes.
        trace: in a dry run, also trace what would be compiled.
        packages: also compile packages where one takes minutes.
    """

    section: str
    budget: float
    dry: bool = False
    trace: bool = False
    packages: bool = False

    def open_device(self) -> Device:
        """What it measures."""
        from benchmarks.gpu.device import Device

        return Device("cpu" if self.dry else "cuda", self.trace)


# The first one also waits until its libraries are imported. The sum of `most` exceeds ten minutes: what one section leaves,
# the next ones may use.
SECTIONS = (
    Section("card", "ceilings", "the card and its ceilings", 20, 40),
    Section("kernels", "kernels", "kernels", 25, 90),
    Section("connector", "connector", "the connector's step", 25, 60),
    Section("sana", "models", "SANA-1.6B 1024 px, planner 3B", 50, 165),
    Section("flux-kontext", "models", "FLUX.1-Kontext 1024 px, planner 7B", 45, 105),
    Section("flux", "models", "FLUX.1-dev-shaped 1024 px, no reference", 40, 85),
    Section("wan", "models", "Wan2.2-5B 704 x 1280 x 121, steps only", 40, 85),
)


def budget_of(index: int, sections: tuple[Section, ...], left: float) -> float:
    """Seconds for one of `sections`: those behind it keep what they need at least, and the last one gets all that is left."""
    behind = sum(section.least for section in sections[index + 1 :])
    return min(sections[index].most, left - behind) if index + 1 < len(sections) else left


def measure(task: Task) -> Found:
    """Run a section."""
    section = next(each for each in SECTIONS if each.name == task.section)
    yield from import_module(f"benchmarks.gpu.{section.module}").measure(task)
