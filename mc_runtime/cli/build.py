"""`mc-runtime build`: a checkpoint becomes a bundle. With `assemble`, the command that needs the build half."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mc_runtime.cli import build_half, options
from mc_runtime.cli.demo import checkpoint_path
from mc_runtime.cli.output import Progress, print_json, progress_bar, seconds, size_of
from mc_runtime.cli.signals import raise_if_interrupted
from mc_runtime.errors import RequestError


@dataclass(frozen=True)
class BuildChoices:
    """What to build, as the command line says it; sizes are (height, width) in pixels."""

    checkpoint: str
    output: Path
    target: str = "onnxruntime"
    precision: str = "fp32"
    engines: tuple[options.EngineChoice, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    max_batch: int | None = None
    lora_rank: int = 0
    step_cache: bool = False
    cache_loss: float | None = None
    force: bool = False
    fallback: tuple[str, str] | None = None
    capabilities: tuple[str, ...] = ()
    calibration: Path | None = None


@click.command("build")
@click.argument("checkpoint")
@click.option("-o", "--output", type=options.FILE, required=True, metavar="BUNDLE", help="Directory to write.")
@click.option(
    "--target", type=click.Choice(options.TARGETS), default="onnxruntime", show_default=True, help="Library to run it."
)
@click.option(
    "--precision", type=click.Choice(options.PRECISIONS), default="fp32", show_default=True, help="What it computes in."
)
@click.option(
    "--engine", "engines", type=options.EngineOption(), multiple=True,
    help="Another target and precision for one component; may be given again.",
)  # fmt: skip
@click.option(
    "--size", "sizes", type=options.Size(), multiple=True,
    help="Serve exactly this height x width; may be given again. Any size the checkpoint takes, if left out.",
)  # fmt: skip
@click.option("--max-batch", type=click.IntRange(1), metavar="N", help="Most pictures that run as one batch.")
@click.option(
    "--fallback", type=options.TargetOption(),
    help="Also put engines of this target (onnxruntime, openvino) in, for machines that cannot run the first: no GPU, another "
    "library version. `generate --fallback` runs them.",
)  # fmt: skip
@click.option(
    "--compute-capability", "capabilities", metavar="LIST",
    help="GPUs that tensorrt-rtx builds for, like 8.9,12.0; Ampere and later if left out. tensorrt builds for the GPU at hand.",
)  # fmt: skip
@click.option(
    "--lora-rank", type=click.IntRange(0), default=0, metavar="R",
    help="Take LoRAs of up to this rank together, at load or per request, by further engines. None, if left out.",
)  # fmt: skip
@click.option(
    "--cache", "step_cache", is_flag=True,
    help="Let requests keep the backbone's residual between steps (`generate --cache`): two more engines, and a threshold "
    "that is calibrated on a few requests.",
)  # fmt: skip
@click.option(
    "--cache-loss", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="LOSS",
    help="Relative difference of the latents that --cache is calibrated to; 0.05 if left out.",
)  # fmt: skip
@click.option(
    "--calibration", type=options.FILE, metavar="FILE",
    help="For fp8 and int4: what `mc-runtime calibrate` wrote. Measured while building, if left out.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Build every engine again, whatever the cache has.")
@options.json_option
@options.debug_option
def command(
    checkpoint: str,
    output: Path,
    target: str,
    precision: str,
    engines: tuple[options.EngineChoice, ...],
    sizes: tuple[tuple[int, int], ...],
    max_batch: int | None,
    fallback: tuple[str, str] | None,
    capabilities: str | None,
    lora_rank: int,
    step_cache: bool,
    cache_loss: float | None,
    calibration: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build CHECKPOINT into a bundle of engines.

    CHECKPOINT is a MetaCanvas directory (with metacanvas.json), the directory of a stock diffusers pipeline, the hub id
    of one, or the name of a demo. Every engine is compared with its torch module; an error beyond the precision's tolerance
    fails the build. Engines are cached by content: the same build again takes seconds, another precision for one component
    rebuilds that one. BUNDLE appears whole or not at all.

    \b
    Examples:
      mc-runtime build ./checkpoint -o ./bundle
      mc-runtime build ./checkpoint -o ./bundle --target openvino --precision bf16
      mc-runtime build ./checkpoint -o ./bundle --target openvino --precision int8 --engine vae_decoder=openvino:bf16
      mc-runtime build ./checkpoint -o ./bundle --size 512x512 --size 512x768 --max-batch 4
      mc-runtime build ./checkpoint -o ./bundle --target tensorrt-rtx --precision bf16 --fallback onnxruntime
      mc-runtime build ./checkpoint -o ./bundle --target tensorrt-rtx --precision fp8 --compute-capability 8.9
      mc-runtime build ./checkpoint -o ./bundle --target tensorrt-rtx --precision int4
      mc-runtime build ./checkpoint -o ./bundle --lora-rank 16
      mc-runtime build ./checkpoint -o ./bundle --target openvino --precision bf16 --cache
    """
    for component, count in Counter(each.component for each in engines).items():
        if count > 1:
            raise RequestError(f"--engine {component}: is given twice; say one target and precision for it")
    named = tuple(each.strip() for each in capabilities.split(",")) if capabilities else ()
    choices = BuildChoices(
        checkpoint_path(checkpoint), output, target, precision, engines, sizes, max_batch, lora_rank,
        step_cache or cache_loss is not None, cache_loss, force, fallback, named, calibration,
    )  # fmt: skip
    with progress_bar("building", quiet=as_json) as progress:
        report = run_build(choices, progress)
    if as_json:
        print_json(report)
    else:
        _print(report)


def run_build(choices: BuildChoices, progress: Progress) -> dict[str, Any]:
    """Build, and give the report as JSON-ready values. Raises EngineError where the build half is not installed."""
    build_half.require("build")
    with build_half.at_work():
        from mc_export.build import BuildEvent, BuildOptions, EngineChoice, build_bundle
        from mc_runtime.bundle.manifest import Precision

        named = {each.component: EngineChoice(each.target, Precision(each.precision)) for each in choices.engines}
        asked: dict[str, Any] = {} if choices.max_batch is None else {"max_batch": choices.max_batch}
        asked |= {} if choices.cache_loss is None else {"cache_loss": choices.cache_loss}
        chosen = BuildOptions(
            target=choices.target,
            precision=Precision(choices.precision),
            engines=named,
            sizes=choices.sizes,
            lora_rank=choices.lora_rank,
            step_cache=choices.step_cache,
            force=choices.force,
            fallback=choices.fallback and EngineChoice(choices.fallback[0], Precision(choices.fallback[1])),
            compute_capabilities=choices.capabilities,
            calibration=choices.calibration,
            **asked,
        )

        def on_event(event: BuildEvent) -> None:
            raise_if_interrupted()
            progress(event.done, event.total, str(event))

        report = build_bundle(choices.checkpoint, choices.output, chosen, on_event)
    return {
        "bundle": str(report.path),
        "unchanged": report.unchanged,
        "seconds": report.seconds,
        "bytes": report.bytes,
        "engines": [{**asdict(engine), "state": str(engine.state)} for engine in report.engines],
    }


def _print(report: dict[str, Any]) -> None:
    """A line an engine, and where the bundle is."""
    for engine in report["engines"]:
        what = f"{engine['target']} {engine['precision']}"
        how = "from the cache" if engine["state"] == "cached" else f"built in {seconds(engine['seconds'])}"
        error = f"error {engine['relative_l2']:.1e} relative, {engine['max_abs']:.1e} at most"
        click.echo(f"{engine['component']:<28}{what:<20}{how:<22}{size_of(engine['bytes']):>10}   {error}")
    cached = all(engine["state"] == "cached" for engine in report["engines"])
    why = "; nothing that the engines are made of has changed" if cached else ""
    if report["unchanged"]:
        why += ", and the bundle was there already, the same to the byte"
    click.echo(f"{report['bundle']}: {size_of(report['bytes'])} in {seconds(report['seconds'])}{why}")
