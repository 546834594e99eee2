"""Trains the editing checkpoint from nothing, on a CPU: planner, autoencoder, then connectors and backbone.

python -m examples.shapes.edit.train
Stopped at any time, the same command goes on from the last saved state in the work folder.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLModel, Qwen2Tokenizer

from examples.shapes.edit import data
from examples.shapes.edit.evaluate import evaluate, shares
from examples.shapes.edit.models import (
    CONFIG,
    STEPS,
    build_backbone,
    build_canvas,
    build_image_processor,
    build_planner,
    build_scheduler,
)
from examples.shapes.edit.train_autoencoder import train_autoencoder
from examples.shapes.edit.train_painter import Painter, train_painter
from examples.shapes.edit.train_planner import train_planner
from examples.shapes.fit import begin, training_options
from examples.shapes.processor import train_tokenizer
from mc_export.checkpoint.save import save_checkpoint
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.planner import Planner
from mc_export.reference import ReferencePipeline

PROBE_EDITS = 60


def save(
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    qwen: Qwen2_5_VLModel,
    canvas: CanvasModel,
    backbone: FluxTransformer2DModel,
    autoencoder: AutoencoderKL,
) -> None:
    """Writes the checkpoint."""
    save_checkpoint(
        folder,
        CONFIG,
        planner=qwen,
        processors=[tokenizer, build_image_processor()],
        canvas=canvas,
        components={"transformer": backbone, "vae": autoencoder, "scheduler": build_scheduler()},
        pipeline_class="FluxKontextPipeline",
    )


def measure(folder: Path, canvas: bool = True) -> str:
    """Accuracy of the checkpoint in `folder` on held-out instructions, in one line."""
    pipeline = ReferencePipeline.from_checkpoint(folder)
    trials = evaluate(partial(pipeline.generate, steps=STEPS, canvas=canvas), PROBE_EDITS, seed=0)
    return "  ".join(f"{name} {share:.2f}" for name, share in shares(trials).items())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@training_options(Path("out/shapes-edit"))
@click.option("--planner-steps", default=1300, show_default=True)
@click.option("--autoencoder-steps", default=1200, show_default=True)
@click.option("--painter-steps", default=5700, show_default=True)
def main(
    work: Path, out: Path, seed: int, threads: int, planner_steps: int, autoencoder_steps: int, painter_steps: int
) -> None:
    """Trains all stages and writes the checkpoint."""
    begin(work, threads)

    tokenizer = train_tokenizer("user\n" + instruction.text for instruction in data.all_instructions())
    torch.manual_seed(seed)
    qwen, canvas, backbone = build_planner(tokenizer), build_canvas(), build_backbone()
    planner = Planner(qwen, canvas.canvas_tokens)
    train_planner(planner, tokenizer, work, seed, planner_steps)
    autoencoder = train_autoencoder(work, seed, autoencoder_steps)

    def probe(_: nn.Module) -> str:
        save(out, tokenizer, qwen, canvas, backbone, autoencoder)
        return measure(out)

    train_painter(Painter(backbone, canvas), planner, autoencoder, tokenizer, work, seed, painter_steps, probe)
    save(out, tokenizer, qwen, canvas, backbone, autoencoder)
    logging.getLogger("shapes").info("without the canvas: %s", measure(out, canvas=False))


if __name__ == "__main__":
    main()
