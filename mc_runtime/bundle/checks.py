"""What fields of the manifest are checked for."""

from __future__ import annotations


def at_least_one(**values: int) -> None:
    """Raise ValueError naming the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
