"""Where to drive a dynamically shifted scheduler, so that the runtime can interpolate its coefficients at any token count.

The coefficients are smooth functions of the shift, and the shift is a line over the tokens. Through Chebyshev nodes, a
polynomial meets such a function to the rounding of float32; whether it does is measured between the nodes, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mc_runtime.sampling.tables import SamplerTable

TOLERANCE = 1e-6
"""Largest error at any count between two nodes, of the largest timestep or coefficient."""
_COUNTS = (9, 17, 33, 65)


def token_nodes(table_of: Callable[[Sequence[int]], SamplerTable], fewest: int, most: int) -> tuple[int, ...] | None:
    """Token counts from `fewest` to `most` between which the schedule may be interpolated.

    Args:
        table_of: the table of given token counts, with the step counts to measure at.
        fewest, most: the range to serve.

    Returns:
        The nodes, both ends among them; None where even many do not suffice: timesteps rounded to whole numbers are not smooth.
    """
    for count in _COUNTS:
        nodes = _lobatto(fewest, most, count)
        between = tuple(sorted(set(_lobatto(fewest, most, 2 * count - 1)) - set(nodes)))
        if not between or _error(table_of(nodes), table_of(between), between) <= TOLERANCE:
            return nodes
    return None


def _lobatto(fewest: int, most: int, count: int) -> tuple[int, ...]:
    """The extrema of a Chebyshev polynomial over the range, rounded; fewer where several round to one."""
    unit = (1 - np.cos(np.linspace(0, np.pi, count))) / 2
    return tuple(sorted({round(fewest + (most - fewest) * float(place)) for place in unit}))


def _error(table: SamplerTable, exact: SamplerTable, counts: Sequence[int]) -> float:
    interpolating = SamplerTable(table.scheduler, table.tables, table.metadata, interpolates=True)
    steps = table.served
    pairs = ((interpolating.schedule(step, tokens), exact.schedule(step, tokens)) for tokens in counts for step in steps)
    return max(
        max(_relative(found.timesteps, true.timesteps), _relative(found.coefficients, true.coefficients))
        for found, true in pairs
    )


def _relative(found: NDArray[np.float32], true: NDArray[np.float32]) -> float:
    return float(np.abs(found.astype(np.float64) - true).max() / np.abs(true).max())
