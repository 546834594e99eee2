"""What is asked for on an H200, as data, and what a report says to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.sections import COMPILE, EAGER

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Bar:
    """One requirement.

    Attributes:
        what: in words.
        sections: whose parts answer it.
        keys: where in a part the number is.
        at_least, at_most: one of them.
        variant: of the ways that answer it: the best of them does; None where every part must pass: the worst answers.
    """

    what: str
    sections: tuple[str, ...]
    keys: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    variant: tuple[str, ...] | None = None

    @property
    def wanted(self) -> str:
        """As a table has it."""
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"

    def verdict(self, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Met, missed or not measured, and the number with the part it comes from."""
        found = [
            (float(value), f"{section}: {name}")
            for section in self.sections
            for name, part in sections.get(section, {}).items()
            if isinstance(part, Mapping)
            and (self.variant is None or (part.get("ours") and part.get("variant") in self.variant))
            if (value := _value(part, self.keys)) is not None
        ]
        row: dict[str, Any] = {"what": self.what, "wanted": self.wanted, "found": None, "where": None, "verdict": NOT_MEASURED}
        if not found:
            return row
        # The best of several ways, or the worst of all that must pass.
        smallest = (self.at_most is not None) == (self.variant is not None)
        value, where = min(found) if smallest else max(found)
        met = (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        return row | {"found": value, "where": where, "verdict": "met" if met else "missed"}


def _value(part: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    value: Any = part
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


_TOTAL = ("seconds", "total", "median")
_OURS = ("bf16",)
BARS = (
    Bar("memory-bound kernels, share of the measured copy (worst)", ("kernels",), ("share_of_copy",), at_least=0.80),
    Bar("connector's step, times eager (worst)", ("connector",), ("over", "eager"), at_least=1.4),
    Bar("SANA 1024 px, 20 steps, end to end, seconds", ("sana",), _TOTAL, at_most=0.40, variant=_OURS),
    Bar("SANA, times eager", ("sana",), (f"over {EAGER}",), at_least=2.5, variant=_OURS),
    Bar("SANA, times torch.compile", ("sana",), (f"over {COMPILE}",), at_least=1.25, variant=_OURS),
    Bar("FLUX.1-dev-shaped, 28 steps, end to end, seconds", ("flux",), _TOTAL, at_most=3.50, variant=_OURS),
    Bar("Wan2.2, a step, times eager", ("wan",), (f"over {EAGER}",), at_least=1.5, variant=_OURS),
    Bar("share of the loop the GPU waits between steps (worst)",
        ("sana", "flux-kontext", "flux", "wan"), ("idle_between_steps",), at_most=0.01),
    Bar("FLUX.1-dev-shaped, FP8, seconds", ("flux",), _TOTAL, at_most=2.9, variant=("fp8",)),
    Bar("FLUX.1-dev-shaped, FP8 or cached, seconds", ("flux",), _TOTAL, at_most=2.38, variant=("fp8", "cached")),
    Bar("SANA, FP8, seconds", ("sana",), _TOTAL, at_most=0.30, variant=("fp8",)),
)  # fmt: skip


def verdicts(sections: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of all bars."""
    return [bar.verdict(sections) for bar in BARS]
