"""The noise an image starts from: its own generator, so that an image does not depend on the batch it is made in."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import RequestError, shown

SEED_LIMIT = 2**63


def validated_seed(seed: int) -> int:
    """`seed` as a plain int.

    Raises:
        RequestError: it is no integer, negative, or 2**63 and above.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if isinstance(seed, bool) or not 0 <= number < SEED_LIMIT:
        raise RequestError(f"seed must be an integer from 0 to {SEED_LIMIT - 1}, got {shown(seed)}")
    return number


def initial_noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Unit normal noise f32 of `shape`, from numpy's counter-based Philox generator: the same bytes for the same seed.

    Raises:
        RequestError: the seed is out of range.
    """
    return _normal(np.random.Philox(validated_seed(seed)), shape)


def further_noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Unit normal noise of the same seed that has nothing to do with its initial noise.

    Raises:
        RequestError: the seed is out of range.
    """
    return _normal(np.random.Philox(validated_seed(seed)).jumped(), shape)


def _normal(bits: np.random.Philox, shape: Sequence[int]) -> NDArray[np.float32]:
    return np.random.Generator(bits).standard_normal(tuple(shape), dtype=np.float32)
