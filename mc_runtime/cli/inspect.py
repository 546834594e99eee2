"""`mc-runtime inspect`: what a bundle is, where it came from, and whether its files are whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from mc_runtime.cli import options
from mc_runtime.cli.demo import bundle_path
from mc_runtime.cli.output import print_json, size_of
from mc_runtime.errors import printable

if TYPE_CHECKING:
    from mc_runtime.bundle.manifest import Engine, Manifest


@click.command("inspect")
@options.bundle_argument
@click.option("--verify", is_flag=True, help="Also read every file and compare its sha256 with the manifest's.")
@options.json_option
@options.debug_option
def command(bundle: str, verify: bool, as_json: bool) -> None:
    """Show what BUNDLE is: engines with their measured error, sizes, sampler, origin.

    With --verify an altered or missing file is an error (exit code 3) that names it.

    \b
    Examples:
      mc-runtime inspect demo
      mc-runtime inspect ./bundle --verify
      mc-runtime inspect ./bundle --json | jq '.manifest.engines.step.error'
    """
    path = bundle_path(bundle, quiet=as_json)
    from mc_runtime.bundle.manifest import manifest_to_json
    from mc_runtime.bundle.store import open_bundle

    opened = open_bundle(path)
    opened.verify(hashes=verify)
    if as_json:
        import json

        manifest = json.loads(manifest_to_json(opened.manifest))
        print_json({"path": str(path), "digest": opened.digest, "verified": verify, "manifest": manifest})
        return
    click.echo(f"{path}")
    for name, value in _facts(opened.manifest).items():
        click.echo(printable(f"  {name:<12}{value}"))
    click.echo(f"  {'engines':<12}")
    for line in _engine_lines(opened.manifest, opened.manifest.engines):
        click.echo(printable(f"    {line}"))
    if opened.manifest.fallback is not None:
        click.echo("  fallback, for machines that do not run these (--fallback)")
        for line in _engine_lines(opened.manifest, opened.manifest.fallback.engines):
            click.echo(printable(f"    {line}"))
    click.echo("every file is there, and has its sha256" if verify else "every file is there (--verify reads them)")


def _facts(manifest: Manifest) -> dict[str, str]:
    """What a person asks first, by name."""
    kind = "stock pipeline" if manifest.stock else "MetaCanvas"
    sizes, canvas = manifest.sizes, manifest.canvas
    if sizes.served:
        served = ", ".join(_size(each) for each in sizes.served)
    else:
        served = f"any multiple of {sizes.multiple} from {sizes.min} to {sizes.max}"
    return {
        "checkpoint": f"{manifest.checkpoint.name} ({kind}, {manifest.backbone}), sha256 {manifest.checkpoint.sha256[:12]}",
        "tasks": ", ".join(manifest.tasks),
        "sizes": f"{_size(sizes.default)} by default; {served}",
        "canvas": "none" if canvas is None else " x ".join(map(str, canvas.grid)) + " tokens (t, h, w)",
        "sampler": f"{manifest.sampler.scheduler}, {manifest.steps.default} steps by default, at most {manifest.steps.max}",
        "guidance": f"{manifest.guidance.default:g} by default, {manifest.guidance.branches} branches",
        "max batch": str(manifest.max_batch),
        "LoRAs": _lora_line(manifest),
        "step cache": _cache_line(manifest),
        "made for": " ".join((manifest.machine.arch, manifest.machine.os, *manifest.machine.features)),
        "built": f"{manifest.created} with " + ", ".join(f"{k} {v}" for k, v in sorted(manifest.versions.items())),
        "on disk": size_of(sum(file.bytes for file in manifest.files.values())),
    }


def _lora_line(manifest: Manifest) -> str:
    groups = [group for engine in manifest.engines.values() for group in engine.lora]
    if not groups:
        return "none"
    layers = sum(len(group.layers) for group in groups)
    return f"up to rank {min(group.rank for group in groups)}, of {layers} layers"


def _cache_line(manifest: Manifest) -> str:
    cache = manifest.step_cache
    if cache is None:
        return "none"
    if cache.threshold is None:
        return "threshold not calibrated"
    row = next((row for row in cache.calibrated if row.threshold == cache.threshold), None)
    measured = "keeps nothing" if row is None else f"{row.computed:.0%} of the steps computed, latents off by {row.loss:.1%}"
    return f"threshold {cache.threshold:g}: {measured} in {cache.requests} requests of {cache.steps} steps"


def _engine_lines(manifest: Manifest, engines: Mapping[str, Engine]) -> list[str]:
    lines = []
    for component, engine in engines.items():
        total = sum(manifest.files[name].bytes for name in engine.files)
        error = "not measured"
        if engine.error is not None:
            error = f"error {engine.error.relative_l2:.1e} relative, {engine.error.max_abs:.1e} at most"
            error += " (of its graph)" if engine.error.of == "graph" else ""
        what = f"{engine.target} {engine.precision}"
        lines.append(f"{component:<18}{what:<20}{size_of(total):>10}   {error}")
    return lines


def _size(size: Any) -> str:
    return f"{size[0]}x{size[1]}"
