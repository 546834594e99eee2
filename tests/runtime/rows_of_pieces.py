"""What every backend's `rows` must make of pieces from anywhere."""

from __future__ import annotations

import numpy as np

from mc_runtime.backends.base import Backend, Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.backends.resident import Resident


def check_rows(backend: Backend) -> None:
    """Pieces of four lengths: on the host, on the backend's device in the middle of a buffer, on another's, and read-only."""
    rng = np.random.default_rng(5)
    whole, short, foreign, locked = (rng.standard_normal(shape, np.float32) for shape in ((3, 2, 4), (3, 4), (1, 4), (2, 4)))
    locked.flags.writeable = False
    here = Resident(backend, backend.to_device(whole))[1]
    there = Resident(other := create_backend("onnxruntime", Settings(threads=1)), other.to_device(foreign))
    made = backend.to_host(backend.rows([short, here, there, locked], (2, 2, 3, 4)))
    expected = np.zeros((2, 2, 3, 4), np.float32)
    expected[0, 0], expected[0, 1, :2], expected[1, 0, :1], expected[1, 1, :2] = short, whole[1], foreign, locked
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(np.asarray(here), whole[1])
