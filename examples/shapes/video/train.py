"""Trains the video checkpoint from nothing, on a CPU: autoencoder, eyes, planner, then connectors and backbone.

python -m examples.shapes.video.train
Stopped at any time, the same command goes on from the last saved state in the work folder.
"""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from examples.shapes.fit import begin, training_options
from examples.shapes.processor import train_tokenizer
from examples.shapes.video.cases import TASKS, sample_cases
from examples.shapes.video.judge import judge, shares
from examples.shapes.video.models import (
    CONFIG,
    STEPS,
    build_autoencoder,
    build_backbone,
    build_canvas,
    build_image_processor,
    build_planner,
    build_scheduler,
)
from examples.shapes.video.reading import Reader
from examples.shapes.video.train_autoencoder import train_autoencoder
from examples.shapes.video.train_painter import Painter, film, tell, train_painter
from examples.shapes.video.train_planner import train_eyes, train_planner
from mc_export.checkpoint.save import save_checkpoint
from mc_export.model.planner import Planner

log = logging.getLogger("shapes")
PROBES = 12
"""Held-out cases of each task that are looked at while the painter learns."""


def save(folder: Path, tokenizer: Any, parts: dict[str, nn.Module]) -> None:
    """Writes the checkpoint with weights in half precision: half the size, and no picture changes by it."""
    half = {name: copy.deepcopy(part).half() for name, part in parts.items()}
    save_checkpoint(
        folder,
        CONFIG,
        planner=half["planner"],
        processors=[tokenizer, build_image_processor()],
        canvas=half["canvas"],  # type: ignore[arg-type]  # parts are what their names say
        components={"transformer": half["transformer"], "vae": half["vae"], "scheduler": build_scheduler()},
        pipeline_class="WanPipeline",
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@training_options(Path("out/shapes-video"))
@click.option("--autoencoder-steps", default=1700, show_default=True)
@click.option("--eyes-steps", default=200, show_default=True)
@click.option("--planner-steps", default=2900, show_default=True)
@click.option("--painter-steps", default=4750, show_default=True)
def main(
    work: Path,
    out: Path,
    seed: int,
    threads: int,
    autoencoder_steps: int,
    eyes_steps: int,
    planner_steps: int,
    painter_steps: int,
) -> None:
    """Trains all stages and writes the checkpoint."""
    begin(work, threads)

    words = [case.prompt for case in sample_cases(4000, False, random.Random(seed))]
    tokenizer = train_tokenizer("user\n" + prompt for prompt in words)
    autoencoder = train_autoencoder(work, seed, autoencoder_steps) if autoencoder_steps else build_autoencoder()
    torch.manual_seed(seed)
    qwen, canvas, backbone = build_planner(tokenizer), build_canvas(), build_backbone()
    parts = {"planner": qwen, "canvas": canvas, "transformer": backbone, "vae": autoencoder}
    save(work / "untrained", tokenizer, parts)
    reader = Reader(work / "untrained", work)
    planner = Planner(qwen, canvas.canvas_tokens)
    train_eyes(planner, reader, work, seed, eyes_steps)
    train_planner(planner, reader, work, seed, planner_steps)

    unseen = sample_cases(PROBES * len(TASKS), True, random.Random(seed + 3))
    told = tell(planner, autoencoder, reader, unseen)
    painter = Painter(backbone, canvas)

    def probe(_: nn.Module) -> str:
        save(out, tokenizer, parts)
        films = film(painter, autoencoder, build_scheduler(), told, STEPS, seed)
        verdicts = [judge(case, frames) for case, frames in zip(unseen, films, strict=True)]
        tasks = [f"{task} {shares(verdicts[index :: len(TASKS)])['overall']:.2f}" for index, task in enumerate(TASKS)]
        return f"{', '.join(tasks)}; {'  '.join(f'{name} {share:.2f}' for name, share in shares(verdicts).items())}"

    train_painter(painter, planner, autoencoder, reader, work, seed, painter_steps, probe)
    save(out, tokenizer, parts)


if __name__ == "__main__":
    main()
