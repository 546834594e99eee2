"""Trains the demo checkpoint from nothing, on a CPU: autoencoder, planner, then connectors and backbone.

python -m examples.shapes.train
Stopped at any time, the same command goes on from the last saved state in the work folder.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import click
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLModel, Qwen2Tokenizer

from examples.shapes import data
from examples.shapes.evaluate import GUIDANCE, STEPS, accuracy, evaluate
from examples.shapes.fit import begin, training_options
from examples.shapes.models import CONFIG, build_backbone, build_canvas, build_planner, build_scheduler
from examples.shapes.processor import build_image_processor, train_tokenizer
from examples.shapes.train_autoencoder import train_autoencoder
from examples.shapes.train_painter import Painter, train_painter
from examples.shapes.train_planner import train_planner
from mc_export.checkpoint.save import save_checkpoint
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.planner import Planner
from mc_export.reference import ReferencePipeline

PROBE_CAPTIONS = 100


def save(
    folder: Path,
    tokenizer: Qwen2Tokenizer,
    qwen: Qwen2_5_VLModel,
    canvas: CanvasModel,
    backbone: SanaTransformer2DModel,
    autoencoder: AutoencoderDC,
) -> None:
    """Writes the checkpoint."""
    save_checkpoint(
        folder,
        CONFIG,
        planner=qwen,
        processors=[tokenizer, build_image_processor()],
        canvas=canvas,
        components={"transformer": backbone, "vae": autoencoder, "scheduler": build_scheduler()},
        pipeline_class="SanaPipeline",
    )


def measure(folder: Path, canvas: bool = True) -> str:
    """Accuracy of the checkpoint in `folder` on held-out captions, in one line."""
    pipeline = ReferencePipeline.from_checkpoint(folder)
    trials = evaluate(partial(pipeline.generate, steps=STEPS, guidance_scale=GUIDANCE, canvas=canvas), PROBE_CAPTIONS, seed=0)
    return "  ".join(f"{name} {share:.2f}" for name, share in accuracy(trials).items())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@training_options(Path("out/shapes"))
@click.option("--autoencoder-steps", default=1500, show_default=True)
@click.option("--planner-steps", default=600, show_default=True)
@click.option("--painter-steps", default=1600, show_default=True)
def main(
    work: Path, out: Path, seed: int, threads: int, autoencoder_steps: int, planner_steps: int, painter_steps: int
) -> None:
    """Trains all stages and writes the checkpoint."""
    begin(work, threads)

    tokenizer = train_tokenizer("user\n" + scene.caption for scene in data.all_scenes())
    autoencoder = train_autoencoder(work, seed, autoencoder_steps)
    torch.manual_seed(seed)
    qwen, canvas, backbone = build_planner(tokenizer), build_canvas(), build_backbone()
    planner = Planner(qwen, canvas.canvas_tokens)
    train_planner(planner, tokenizer, work, seed, planner_steps)

    def probe(_: nn.Module) -> str:
        save(out, tokenizer, qwen, canvas, backbone, autoencoder)
        return measure(out)

    train_painter(Painter(backbone, canvas), planner, autoencoder, tokenizer, work, seed, painter_steps, probe)
    save(out, tokenizer, qwen, canvas, backbone, autoencoder)
    logging.getLogger("shapes").info("without the canvas: %s", measure(out, canvas=False))


if __name__ == "__main__":
    main()
