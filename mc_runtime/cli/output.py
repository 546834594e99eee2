"""What commands print: JSON documents, plain lines, and progress bars where a person watches a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click


class Progress(Protocol):
    """Tells how far the work is: `done` of `total` units, and what is going on now."""

    def __call__(self, done: float, total: float, what: str = "") -> None: ...


def print_json(document: Any) -> None:
    """Print `document` as the one JSON document of this command."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def seconds(value: float) -> str:
    """A duration as a person says it: `4.2 ms`, `0.42 s`, `12.3 s`, `3 min 20 s`."""
    if value < 0.1:
        return f"{1000 * value:.1f} ms"
    if value < 10:
        return f"{value:.2f} s"
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def size_of(count: int) -> str:
    """A number of bytes as a person says it: `512 B`, `14.2 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar with the time left on a terminal's stderr; silence where stderr is no terminal, or under `quiet`."""
    if quiet or not sys.stderr.isatty():
        yield _silence
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(done: float, total: float, what: str = "") -> None:
            bar.update(task, completed=done, total=total, description=what or title)

        yield report


def _silence(done: float, total: float, what: str = "") -> None:
    """The progress of nobody watching."""
