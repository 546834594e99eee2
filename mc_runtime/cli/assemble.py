"""`mc-runtime assemble`: a planner, a stock pipeline and canvas weights become one MetaCanvas checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from mc_runtime.cli import build_half, options
from mc_runtime.cli.output import print_json


@click.command("assemble")
@click.option("--pipeline", required=True, metavar="PIPELINE", help="A stock diffusers pipeline: a directory or a hub id.")
@click.option("--planner", required=True, metavar="PLANNER", help="Qwen2.5-VL with its processor: a directory or a hub id.")
@click.option("-o", "--output", type=options.FILE, required=True, metavar="CHECKPOINT", help="Directory to write.")
@click.option(
    "--canvas", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="canvas.safetensors: canvas tokens and connectors. Fresh ones that change nothing, if left out.",
)  # fmt: skip
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="metacanvas.json. If left out: one canvas token per latent token at the pipeline's own size.",
)  # fmt: skip
@click.option(
    "--lora", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR", help="PEFT adapter for the planner."
)
@click.option(
    "--conditioning", type=click.Choice(["planner", "text_encoder"]), default="planner", show_default=True,
    help="Who gives the backbone its context; --config says it itself.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Seed of fresh canvas weights.")
@options.json_option
@options.debug_option
def command(
    pipeline: str,
    planner: str,
    output: Path,
    canvas: Path | None,
    config: Path | None,
    lora: Path | None,
    conditioning: str,
    seed: int,
    as_json: bool,
) -> None:
    """Make a MetaCanvas checkpoint out of a planner, a stock pipeline and canvas weights.

    Without --canvas the canvas is fresh: both of its projections are zero, so that the pictures are exactly the stock
    pipeline's until it is trained. CHECKPOINT appears whole or not at all.

    \b
    Examples:
      mc-runtime assemble --pipeline ./sana --planner ./qwen2.5-vl-3b -o ./checkpoint
      mc-runtime assemble --pipeline ./sana --planner ./qwen2.5-vl-3b --canvas canvas.safetensors --config metacanvas.json \\
                          --lora ./planner_lora -o ./checkpoint
      mc-runtime build ./checkpoint -o ./bundle
    """
    build_half.require("assemble")
    with build_half.at_work():
        from mc_export.checkpoint.assemble import assemble_checkpoint

        made = assemble_checkpoint(
            output,
            planner=planner,
            pipeline=pipeline,
            canvas=canvas,
            config=config,
            lora=lora,
            conditioning=conditioning,
            seed=seed,
        )
    if as_json:
        print_json({"checkpoint": str(output), "conditioning": made.conditioning, "sha256": made.sha256})
        return
    click.echo(output)
    click.echo(f"build it with: mc-runtime build {output} -o BUNDLE", err=True)
