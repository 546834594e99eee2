"""The sizes a plan takes: from how far a program's dimensions reach, the sizes a bundle serves and what most requests ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mc_export.program.base import Axis, Extents
from mc_runtime.backends.trt_plans import Profile

# A plan is tuned for one size of every dimension. Where nothing says which is usual, as for lengths of text, this share of the
# largest.
_USUAL_SHARE = 4


def profiles_of(axes: Mapping[str, Axis], usual: Extents, served: Sequence[Extents] = ()) -> tuple[Profile, ...]:
    """Profiles of a program.

    Args:
        axes: its dynamic dimensions.
        usual: sizes that most requests have, of those dimensions of which it is known.
        served: the only sizes that a bundle serves, of the dimensions that they decide: one profile each, with those fixed.
            None for one profile over everything.
    """
    if not any(name in axes for sizes in served for name in sizes):
        return (_profile(axes, usual, {}),)
    profiles = [_profile(axes, usual, sizes) for sizes in served]
    return tuple(profile for index, profile in enumerate(profiles) if profile not in profiles[:index])


def _profile(axes: Mapping[str, Axis], usual: Extents, fixed: Extents) -> Profile:
    ranges = {}
    for name, axis in axes.items():
        if name in fixed:
            size = _within(axis, fixed[name])
            ranges[name] = (size, size, size)
        else:
            ranges[name] = (axis.min, _within(axis, usual.get(name, axis.max // _USUAL_SHARE)), axis.max)
    return ranges


def _within(axis: Axis, size: int) -> int:
    """The nearest size from below that the dimension takes."""
    return min(axis.max, max(axis.min, size - size % axis.multiple))
