"""What the evaluations draw with: a bundle through the runtime, or a checkpoint through torch, with or without its canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Source:
    """Who draws.

    Attributes:
        name: the bundle's or checkpoint's path.
        canvas: whether the canvas is drawn on.
        generate: `generate(prompt, seed=...)`, whose result has `images` or `clips`.
    """

    name: str
    canvas: bool
    generate: Callable[..., Any]

    def __str__(self) -> str:
        return self.name if self.canvas else f"{self.name} without canvas"

    @property
    def options(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"source": self.name, "canvas": self.canvas}


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `--bundle`, `--checkpoint` and `--no-canvas`, and calls it with the `source` that they name."""

    @click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="A built bundle, run by mc_runtime.")
    @click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A checkpoint, run by torch.")
    @click.option("--no-canvas", is_flag=True, help="Leave the canvas out (checkpoint only).")
    @wraps(command)
    def with_source(bundle: Path | None, checkpoint: Path | None, no_canvas: bool, **options: Any) -> None:
        command(source=_source(bundle, checkpoint, no_canvas), **options)

    return with_source


def _source(bundle: Path | None, checkpoint: Path | None, no_canvas: bool) -> Source:
    """Raises click.UsageError unless one of them is given. Either half of the project is imported only if it is to draw."""
    if bundle is not None and checkpoint is None:
        if no_canvas:
            raise click.UsageError("--no-canvas needs --checkpoint: a bundle has its canvas built in")
        from mc_runtime import Runtime

        return Source(str(bundle), True, Runtime.load(bundle).generate)
    if checkpoint is not None and bundle is None:
        from mc_export.reference import ReferencePipeline

        pipeline = ReferencePipeline.from_checkpoint(checkpoint)
        return Source(str(checkpoint), not no_canvas, partial(pipeline.generate, canvas=not no_canvas))
    raise click.UsageError("give either --bundle or --checkpoint")
