"""`mc-runtime calibrate`: what FP8 or INT4 costs at every layer of a checkpoint, and which layers stay in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_runtime.cli import build_half, options
from mc_runtime.cli.demo import checkpoint_path
from mc_runtime.cli.output import print_json, progress_bar
from mc_runtime.cli.signals import raise_if_interrupted

COMPONENTS = ("planner", "step")
SCALES = ("rows", "tensor", "blocks")
_FP8 = SCALES[:2]
_WORST = 12
_BAR = 24


@click.command("calibrate")
@click.argument("checkpoint")
@click.option("-o", "--output", type=options.FILE, required=True, metavar="FILE", help="JSON file to write.")
@click.option(
    "--component", "components", type=click.Choice(COMPONENTS), multiple=True,
    help="Measure this engine only; may be given again.",
)  # fmt: skip
@click.option(
    "--scales", type=click.Choice(SCALES), multiple=True,
    help="What has a scale of its own: for fp8 rows of the input (inductor-cuda) or all of it (tensorrt, tensorrt-rtx), both "
    "if left out; for int4 blocks of the weights.",
)  # fmt: skip
@click.option(
    "--loss", type=float, metavar="E",
    help="Largest relative L2 error that it may cost an engine; the project's own for each, if left out.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, metavar="N", help="Seed of the noise.")
@options.json_option
@options.debug_option
def command(
    checkpoint: str,
    output: Path,
    components: tuple[str, ...],
    scales: tuple[str, ...],
    loss: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure what FP8 or INT4 costs at every layer of CHECKPOINT, and choose those that stay in bfloat16.

    The checkpoint's own prompts (prompt.calibration in metacanvas.json, else a built-in list) are read and denoised; then one
    layer after another is put into it alone, and the error of the engine's result is what it costs. Layers are kept, the
    dearest for their work first, until the rest together lose no more than --loss. `build --precision fp8 --calibration FILE`
    (or int4) takes the file; the same checkpoint and seed give the same file.

    \b
    Examples:
      mc-runtime calibrate ./checkpoint -o fp8.json
      mc-runtime calibrate ./checkpoint -o fp8.json --component step --scales rows --loss 0.05
      mc-runtime calibrate ./checkpoint -o int4.json --scales blocks
      mc-runtime build ./checkpoint -o ./bundle --target tensorrt-rtx --precision fp8 --calibration fp8.json
    """
    from mc_runtime.media.files import check_writable

    check_writable(output)
    build_half.require("calibrate")
    with build_half.at_work(), progress_bar("calibrating", quiet=as_json) as progress:
        from mc_export.build.calibrate import CalibrationOptions, calibrate
        from mc_export.checkpoint.load import load_checkpoint
        from mc_export.quantize.fp8.layers import Activations
        from mc_runtime.bundle.decode import encode

        def report(done: float, total: float, what: str) -> None:
            raise_if_interrupted()
            progress(done, total, what)

        chosen = CalibrationOptions(
            components=components, activations=tuple(map(Activations, scales or _FP8)), loss=loss, seed=seed
        )
        record = calibrate(load_checkpoint(checkpoint_path(checkpoint)), chosen, report)
        record.save(output)
        document: dict[str, Any] = encode(record)
    if as_json:
        print_json(document)
        return
    for measured in document["measured"]:
        _print(measured)
    click.echo(output)


def _print(measured: dict[str, Any]) -> None:
    """A line of summary, and the dearest layers as bars."""
    sites = measured["sites"]
    kept = [site for site in sites if site["kept"]]
    share = sum(site["work"] for site in kept)
    name, form = _NAMES[measured["activations"]]
    click.echo(
        f"{measured['component']}, a scale for each {name}: all in {form} lose "
        f"{measured['error_of_all']:.3g}, with {len(kept)} of {len(sites)} kept ({100 * share:.1f} % of the work) "
        f"{measured['error']:.3g} of {measured['loss']:g}"
    )
    worst = sorted(sites, key=lambda site: -float(site["error"]))[:_WORST]
    largest = max(float(site["error"]) for site in worst) or 1.0
    width = max(len(_shown(site)) for site in worst)
    for site in worst:
        bar = "#" * max(1, round(_BAR * site["error"] / largest))
        why = f"kept: {site['kept']}" if site["kept"] else ""
        click.echo(
            f"  {_shown(site):<{width}}  {bar:<{_BAR}}  {site['error']:.2e}  {100 * site['work']:5.1f} %  {why}".rstrip()
        )


_NAMES = {"rows": ("row", "FP8"), "tensor": ("tensor", "FP8"), "blocks": ("block", "INT4")}


def _shown(site: dict[str, Any]) -> str:
    """The first layer's name and how many more read the same input."""
    first, *others = site["layers"]
    return f"{first} +{len(others)}" if others else str(first)
