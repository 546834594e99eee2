"""Runs every file of `interpreter/` in a process of its own, where kernels are decorated for Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))
LIMIT_SECONDS = 600  # a kernel that never ends, on the slowest machine


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem.removeprefix("test_"))
def test_under_the_interpreter(file: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header", str(file)],
        cwd=ROOT,
        env=inherited | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{file.name} exited with {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
