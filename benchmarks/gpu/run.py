"""Runs the sections one after the other, each in a process of its own, and keeps every part of a result as it comes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.sections import SECTIONS, Section, Task, budget_of, measure

PART = "part "  # a child's lines that begin so are results; the others are notes of libraries
GO = "go "
READY = "ready\n"
_GRACE = 3.0  # seconds a section may outlast its budget
_IMPORTS = 120.0  # seconds that importing the libraries may take: on a fresh machine they come from a cold disk
# Graphs that were captured before a profiler ran are not replayed reliably after it has gone; so it stays (torch.profiler).
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}

Results = dict[str, dict[str, Any]]
Heard = Callable[[str, str, dict[str, Any]], None]


class Child:
    """A section's process. It imports its libraries at once and begins when it is told its task.

    Args:
        command: what to run; `serve` is its other end.
    """

    def __init__(self, command: Sequence[str]) -> None:
        environment = os.environ | _ENVIRONMENT
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=environment,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
        """The parts of its result; the last one, `ended`, says why where it did not end by itself.

        The task's seconds begin when the libraries are imported.
        """
        assert self._process.stdin is not None
        end, ready = time.perf_counter() + _IMPORTS, False
        try:
            self._process.stdin.write(GO + json.dumps(asdict(task)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already; its last words come below
        notes: deque[str] = deque(maxlen=12)
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, end - time.perf_counter()))
            except queue.Empty:
                self.end()
                why = f"its {task.budget:.0f} s were over" if ready else f"its libraries were not imported in {_IMPORTS:.0f} s"
                yield "ended", {"why": why, "notes": list(notes)}
                return
            if line is None:
                break
            if line == READY:
                end, ready = time.perf_counter() + task.budget + _GRACE, True
                continue
            if line.startswith(PART):
                name, found = json.loads(line.removeprefix(PART))
                yield name, found
            else:
                notes.append(line.rstrip()[:300])
        status = self._process.wait()
        if status:
            yield "ended", {"why": f"its process ended with {status}", "notes": list(notes)}

    def end(self) -> None:
        """Stops it and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def serve() -> None:
    """A child's side: import, say so, wait for the task, print the parts."""
    import benchmarks.gpu.models  # noqa: F401  # now, while another section measures, and not in this one's own time

    print(READY, end="", flush=True)
    line = sys.stdin.readline()
    if not line.startswith(GO):
        return
    for name, found in measure(Task(**json.loads(line.removeprefix(GO)))):
        print(PART + json.dumps([name, found]), flush=True)


def command() -> list[str]:
    """What starts a section's process."""
    return [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--serve"]


def run_sections(names: Sequence[str], budget: float, heard: Heard, **options: bool) -> Results:
    """All named sections in their order; `heard` is told of every part. `options` are those of `Task`.

    A dry run stays in this process, since nothing in it can hang a GPU, and has no budgets.
    """
    dry = options.get("dry", False)
    sections = tuple(section for section in SECTIONS if section.name in names)
    results: Results = {section.name: {} for section in sections}
    end = time.perf_counter() + budget
    following = None if dry else Child(command())
    try:
        for index, section in enumerate(sections):
            seconds = budget if dry else budget_of(index, sections, end - time.perf_counter())
            if seconds < section.least and not dry:
                _keep(results, section, "ended", {"why": f"skipped: {max(0.0, seconds):.0f} s were left"}, heard)
                continue
            task, child = Task(section.name, seconds, **options), following
            start = time.perf_counter()
            # The next one imports its libraries while this one measures.
            following = Child(command()) if not dry and index + 1 < len(sections) else None
            for name, found in measure(task) if child is None else child.run(task):
                _keep(results, section, name, found, heard)
            _keep(results, section, "spent", {"seconds": time.perf_counter() - start, "budget": seconds}, heard)
    finally:
        if following is not None:
            following.end()
    return results


def _keep(results: Results, section: Section, name: str, found: dict[str, Any], heard: Heard) -> None:
    results[section.name][name] = found
    heard(section.name, name, found)


def write(file: Path, report: dict[str, Any]) -> None:
    """Whole or not at all: a run that is killed leaves the last complete state."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)
