"""`mc-runtime bench`: how fast a bundle is on this machine, alone or against the torch reference."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mc_runtime.cli import build_half, demo, options
from mc_runtime.cli.output import progress_bar, seconds
from mc_runtime.cli.outputs import check_output
from mc_runtime.errors import EngineError, OutputError

_STANDARD_OUTPUT = Path("-")


@click.command("bench")
@options.bundle_argument
@click.option(
    "--against", type=click.Choice(["eager", "compile"]), multiple=True,
    help="Also time the torch reference of --checkpoint in fp32, as it is or compiled; may be given again.",
)  # fmt: skip
@click.option("--checkpoint", metavar="CHECKPOINT", help="What BUNDLE was built from; needed by --against, known for a demo.")
@click.option("--runs", type=click.IntRange(1), default=10, show_default=True, metavar="N", help="Rounds to time.")
@click.option("--prompt", default="a red circle left of a blue square", show_default=True, metavar="TEXT", help="What to draw.")
@options.media_options
@options.request_options
@options.engine_options
@click.option("--json", "json_file", type=options.FILE, metavar="FILE", help="Write the report; - is standard output.")
@click.option("--chart", type=options.FILE, metavar="FILE", help="Draw the report as bars (.png); needs matplotlib.")
@options.debug_option
def command(
    bundle: str,
    against: tuple[str, ...],
    checkpoint: str | None,
    runs: int,
    json_file: Path | None,
    chart: Path | None,
    **request: Any,
) -> None:
    """Time BUNDLE stage by stage, and against the torch reference in the same run.

    Numbers are checked before they are timed: everybody denoises the same noise, and the difference of the latents is in the
    report. Rounds are interleaved and shuffled, planner included; medians are reported with the machine they come from.

    \b
    Examples:
      mc-runtime bench demo
      mc-runtime bench demo --against eager --against compile
      mc-runtime bench ./bundle --against eager --checkpoint ./checkpoint --runs 20 --threads 2
      mc-runtime bench ./bundle --image in.png --prompt "make the red circle blue"
      mc-runtime bench ./bundle --json bench.json --chart bench.png
    """
    _check_outputs(json_file, chart)
    if against:
        checkpoint = _checkpoint(bundle, checkpoint)
        build_half.require("--against")
    quiet = json_file == _STANDARD_OUTPUT
    path = demo.bundle_path(bundle, quiet=quiet)
    from mc_runtime.bench import BenchRequest, chart_from_report, run_bench

    with build_half.at_work(), progress_bar("timing", quiet=quiet) as progress:
        asked = BenchRequest(
            prompt=request["prompt"], size=request["size"], steps=request["steps"], guidance=request["guidance"],
            seed=request["seed"], threads=request["threads"], device=request["device"], fallback=request["fallback"],
            media=_media(request),
        )  # fmt: skip
        report = run_bench(path, asked, runs=runs, against=against, checkpoint=checkpoint, on_round=progress)
    if chart is not None:
        chart_from_report(report, chart)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    if quiet:
        click.echo(text)
        return
    if json_file is not None:
        json_file.write_text(text + "\n", encoding="utf-8")
    _print(report)


def _check_outputs(json_file: Path | None, chart: Path | None) -> None:
    """Everything that will be written can be, before minutes of timing."""
    if chart is not None:
        if find_spec("matplotlib") is None:
            raise EngineError("--chart draws with matplotlib, which is not installed; install with: pip install matplotlib")
        check_output(chart)
    if json_file is not None and json_file != _STANDARD_OUTPUT and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise OutputError(f"{json_file}: cannot be written; name a file in a directory that exists")


def _checkpoint(bundle: str, checkpoint: str | None) -> str:
    if checkpoint is None and bundle not in demo.CHECKPOINTS:
        raise click.UsageError("--against needs --checkpoint: the torch reference runs what BUNDLE was built from.")
    return demo.checkpoint_path(checkpoint or bundle)


def _media(request: dict[str, Any]) -> dict[str, Any]:
    """What a task takes beside the prompt, where it was given."""
    return options.media_of(request) | ({"task": request["task"]} if request["task"] else {})


def _print(report: dict[str, Any]) -> None:
    """The report for a person: the machine, then a row a contestant and a stage."""
    engines = ", ".join(f"{component} {engine}" for component, engine in report["bundle"]["engines"].items())
    request = report["request"]
    click.echo(report["machine_text"])
    click.echo(f"{report['bundle']['name']}: {engines}")
    height, width = request["size"]
    click.echo(f"{height}x{width}, {request['steps']} steps, guidance {request['guidance']:g}, {report['runs']} rounds\n")
    for name, stages in report["results"].items():
        ratio = report["speedup"].get(name)
        note = "" if ratio is None else f"   the bundle is {ratio:.2f} x as fast"
        total = stages["total"]
        click.echo(f"{name:<10}{seconds(total['median']):>12}   {seconds(total['min'])} to {seconds(total['max'])}{note}")
        for stage, value in stages.items():
            if stage not in ("total", "engines", "everything"):
                click.echo(f"  {stage:<8}{seconds(value['median']):>12}")
        check = report["check"].get(name)
        if check is not None:
            click.echo(f"  latents differ by {check['relative_l2']:.1e} (relative L2), {check['max_abs']:.1e} at most")
    click.echo(f"\nloading the bundle took {seconds(report['load_seconds'])}; host share {100 * report['host_share']:.1f} %")
