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
        cache: whether residuals are kept between steps, or by which threshold.
    """

    name: str
    canvas: bool
    generate: Callable[..., Any]
    cache: bool | float = False

    def __str__(self) -> str:
        kept = "" if self.cache is False else ", residuals kept" + ("" if self.cache is True else f" below {self.cache:g}")
        return (self.name if self.canvas else f"{self.name} without canvas") + kept

    @property
    def options(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"source": self.name, "canvas": self.canvas, "cache": self.cache}


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command `--bundle`, `--checkpoint`, `--no-canvas` and `--cache`, and calls it with the `source` they name."""

    @click.option("--bundle", type=click.Path(exists=True, path_type=Path), help="A built bundle, run by mc_runtime.")
    @click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A checkpoint, run by torch.")
    @click.option("--no-canvas", is_flag=True, help="Leave the canvas out (checkpoint only).")
    @click.option("--cache", is_flag=True, help="Keep residuals between steps, by the bundle's threshold (bundle only).")
    @click.option("--cache-threshold", type=float, help="The same by another threshold.")
    @wraps(command)
    def with_source(
        bundle: Path | None,
        checkpoint: Path | None,
        no_canvas: bool,
        cache: bool,
        cache_threshold: float | None,
        **options: Any,
    ) -> None:
        command(source=_source(bundle, checkpoint, no_canvas, cache if cache_threshold is None else cache_threshold), **options)

    return with_source


def _source(bundle: Path | None, checkpoint: Path | None, no_canvas: bool, cache: bool | float) -> Source:
    """Raises click.UsageError unless one of them is given. Either half of the project is imported only if it is to draw."""
    if bundle is not None and checkpoint is None:
        if no_canvas:
            raise click.UsageError("--no-canvas needs --checkpoint: a bundle has its canvas built in")
        from mc_runtime import Runtime

        return Source(str(bundle), True, partial(Runtime.load(bundle).generate, cache=cache), cache)
    if checkpoint is not None and bundle is None:
        if cache is not False:
            raise click.UsageError("--cache needs --bundle: the torch reference computes every step whole")
        from mc_export.reference import ReferencePipeline

        pipeline = ReferencePipeline.from_checkpoint(checkpoint)
        return Source(str(checkpoint), not no_canvas, partial(pipeline.generate, canvas=not no_canvas))
    raise click.UsageError("give either --bundle or --checkpoint")
