"""Runs a command as a person would, and tells how long it took and how much memory it held."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_WATCH_SECONDS = 0.2


class Ran(NamedTuple):
    """Seconds from start to end, peak resident bytes, and standard output."""

    seconds: float
    peak_bytes: int
    output: str


class MemoryRanOutError(RuntimeError):
    """The command was ended because it left too little memory to the rest of the machine."""


def run(command: Sequence[str | Path], *, keep_free: int = 0) -> Ran:
    """Run to the end; its error output goes where ours goes only if it fails.

    Args:
        command: program and arguments.
        keep_free: end it, with MemoryRanOutError, when the machine has fewer bytes available than this.

    Raises:
        RuntimeError: it failed; the message ends as its output does.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=errors, env=environment())
        guard = _Guard(process, keep_free)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        guard.stop()
        output.seek(0)
        errors.seek(0)
        said = output.read().decode(errors="replace")
        complaint = errors.read().decode(errors="replace")
    peak = usage.ru_maxrss * 1024  # Linux counts in KiB
    if guard.fired:
        last = (complaint.strip().splitlines() or ["nothing"])[-1][:200]
        left = f"less than {keep_free / 2**30:.1f} GiB were left"
        raise MemoryRanOutError(f"ended at {peak / 2**30:.1f} GiB resident: {left}; the last it said: {last}")
    if process.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} ended with {process.returncode}: {(said + complaint)[-2000:]}")
    return Ran(seconds, peak, said)


def environment() -> dict[str, str]:
    """As a user has it: Python keeps its compiled modules, and this checkout's packages can be imported."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")}
    packages = [str(ROOT), str(ROOT / "export"), str(ROOT / "kernels")]
    return kept | {"PYTHONPATH": os.pathsep.join(packages), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def mc_runtime(*arguments: str | Path) -> list[str]:
    """The command line of `mc-runtime` in this environment."""
    script = Path(sys.executable).with_name("mc-runtime")
    if script.is_file():
        return [str(script), *map(str, arguments)]
    return [sys.executable, "-c", "from mc_runtime.cli.main import main; main()", *map(str, arguments)]


def available_memory() -> int:
    """Bytes that can be had without pushing anything out; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


class _Guard:
    """Ends a process before the machine runs out of memory: the system would end whichever it likes."""

    def __init__(self, process: subprocess.Popen[bytes], keep_free: int) -> None:
        self.fired = False
        self._process = process
        self._keep_free = keep_free
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if keep_free:
            self._thread.start()

    def stop(self) -> None:
        """The process has ended."""
        self._ended.set()
        if self._keep_free:
            self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            if available_memory() < self._keep_free:
                self.fired = True
                self._process.kill()
                return
