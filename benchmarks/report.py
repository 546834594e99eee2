"""What a benchmark leaves behind: one JSON document with the machine, a table, a chart."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_runtime.machine import installed_versions, this_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = ROOT / "docs" / "images"
STAGES = ("plan", "denoise", "decode")

console = Console(width=128, soft_wrap=True)


def as_json(document: Any) -> str:
    """Text of a document."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def from_json(file: Path) -> Any:
    """A document from its file."""
    return json.loads(file.read_text(encoding="utf-8"))


def card() -> dict[str, Any]:
    """When, where and with what a result was measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "machine": this_machine().as_dict(),
        "machine_text": str(this_machine()),
        "kernel": platform.release(),
        "versions": installed_versions(),
        "load_before": os.getloadavg()[0],
    }


def save(name: str, report: Mapping[str, Any], folder: Path | None = None) -> Path:
    """Write `NAME.json` to `folder`, by default benchmarks/results; print it as the last line, too."""
    target = folder or RESULTS
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"{name}.json"
    file.write_text(as_json(report), encoding="utf-8")
    console.print(f"report: {file}", style="dim")
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return file


def print_table(report: Mapping[str, Any]) -> None:
    """An end-to-end report: a row a contestant, fastest last; then the bars."""
    request = report["request"]
    console.print(f"\n[bold]{report['checkpoint']}[/bold] on {report['machine_text']}")
    console.print(
        f"{request['size'][0]} x {request['size'][1]} px, {request['steps']} steps, guidance {request['guidance']:g}, "
        f"{request['threads']} threads, median of {report['rounds']} interleaved rounds"
    )
    table = Table()
    stages = [f"{stage} s" for stage in STAGES]
    for title in ("", "total s", "range", *stages, "host %", "x eager", "latents L2", "picture /255"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    contestants = report["contestants"]
    for name in sorted(contestants, key=lambda each: -contestants[each]["seconds"]["total"]["median"]):
        entry = contestants[name]
        total = entry["seconds"]["total"]
        host = entry.get("host_share")
        table.add_row(
            name, f"{total['median']:.3f}", f"{total['min']:.3f}-{total['max']:.3f}",
            *(f"{entry['seconds'][stage]['median']:.3f}" for stage in STAGES),
            "" if host is None else f"{100 * host:.2f}", f"{entry['ratio']:.2f}",
            f"{entry['check']['latents_relative_l2']:.1e}", f"{entry['check']['picture_mean_error']:.2f}",
        )  # fmt: skip
    console.print(table)
    for name, why in report.get("left_out", {}).items():
        console.print(f"left out: {name}: {why}", markup=False)
    print_bars(report.get("bars", ()))


def print_bars(bars: Any) -> None:
    """What was asked for and what was found."""
    for bar in bars:
        verdict = "[green]met[/green]" if bar["met"] else "[red]missed[/red]"
        console.print(f"{verdict:<20} {bar['what']}: {bar['found']:.3g} (wanted {bar['wanted']})")


def chart(report: Mapping[str, Any], file: Path) -> None:
    """Bars of the stages' medians, slowest on top, with the ratio to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contestants = report["contestants"]
    names = sorted(contestants, key=lambda each: -contestants[each]["seconds"]["total"]["median"])
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(names)), layout="constrained")
    left = [0.0] * len(names)
    for stage, colour in zip(STAGES, ("#7a5195", "#2f7ebc", "#ef8a3c"), strict=True):
        widths = [contestants[name]["seconds"][stage]["median"] for name in names]
        axes.barh(names, widths, left=left, label=stage, color=colour, height=0.72)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, name in enumerate(names):
        total = contestants[name]["seconds"]["total"]["median"]
        axes.annotate(f" {total:.2f} s   {contestants[name]['ratio']:.2f} x", (left[row], row), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"seconds a picture, {report['request']['threads']} threads; x: torch eager fp32 / this")
    axes.set_title(f"{report['checkpoint']}: {report['machine_text'].split(',')[0]}", fontsize=11, loc="left")
    axes.legend(fontsize=9, loc="lower right", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def bar(what: str, found: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One requirement: what was measured against what was asked for."""
    met = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)
    wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    return {"what": what, "found": found, "wanted": wanted, "met": met}


def _revision() -> str | None:
    """The commit that was measured, with a + where files differ from it; None outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
