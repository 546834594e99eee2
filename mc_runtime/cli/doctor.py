"""`mc-runtime doctor`: what this machine can build and run, and what to install for the rest."""

from __future__ import annotations

import os
import shutil
from typing import Any

import click

from mc_runtime import __version__
from mc_runtime.cache import cache_root, size_on_disk
from mc_runtime.cli import build_half, demo, options
from mc_runtime.cli.output import print_json, size_of
from mc_runtime.machine import installed_versions, this_machine


@click.command("doctor")
@options.json_option
@options.debug_option
def command(as_json: bool) -> None:
    """Tell which targets this machine can run, and what to install for the others.

    \b
    Examples:
      mc-runtime doctor
      mc-runtime doctor --json
    """
    report = diagnosis()
    if as_json:
        print_json(report)
    else:
        _print(report)


def diagnosis() -> dict[str, Any]:
    """The whole report as JSON-ready values."""
    from mc_runtime.backends.registry import available

    targets = available()
    missing = build_half.missing_modules()
    compiler = _compiler()
    root = cache_root()
    return {
        "mc_runtime": __version__,
        "machine": this_machine().as_dict(),
        "versions": installed_versions(),
        "targets": targets,
        "build": {"ready": not missing, "missing": missing, "mend": build_half.MEND if missing else None},
        "compiler": {"path": compiler, "mend": None if compiler else "apt install g++, or name a compiler in CXX"},
        "demos": {name: {"checkpoint": str(path), "shipped": demo.shipped(name)} for name, path in demo.CHECKPOINTS.items()},
        "cache": {"path": str(root), "bytes": size_on_disk(root)},
    }


def _compiler() -> str | None:
    """The C++ compiler that a build for inductor would take, or None."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def _print(report: dict[str, Any]) -> None:
    """The report for a person."""
    click.echo(f"mc-runtime {report['mc_runtime']}, Python {report['machine']['python']}")
    click.echo(f"{this_machine()}\n")
    for name, target in report["targets"].items():
        _line(name, target["ready"], f"runs ({target['version']})", target["reason"], target["mend"])
    build = report["build"]
    lacks = f"{', '.join(build['missing'])} not installed"
    _line("build", build["ready"], "this environment can build bundles", lacks, build["mend"])
    compiler = report["compiler"]
    lacks = "there is no C++ compiler, which building for inductor needs"
    path = compiler["path"]
    _line("compiler", path is not None, f"{path}, for building inductor engines", lacks, compiler["mend"])
    for name, each in report["demos"].items():
        _line(name, each["shipped"], each["checkpoint"], "not in this installation", "use a checkout of the project")
    cache = report["cache"]
    click.echo(f"  {'cache':<14}{cache['path']} ({size_of(cache['bytes'])})")


def _line(name: str, ready: bool, good: str, bad: str | None, mend: str | None) -> None:
    mark = click.style("✓", fg="green") if ready else click.style("✗", fg="red")
    text = good if ready else f"no: {bad}" + (f"; {mend}" if mend else "")
    click.echo(f"{mark} {name:<14}{text}")
