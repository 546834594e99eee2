"""A run's card, tables and chart, and the generated part of docs/benchmarks.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import report as common
from benchmarks.gpu.bars import verdicts
from benchmarks.gpu.sections import SECTIONS

NOT_ON_A_GPU = "not measured on a GPU"
DOCS = common.ROOT / "docs" / "benchmarks.md"
_BEGIN, _END = "<!-- gpu -->", "<!-- end gpu -->"
_COLOURS = ("#ef8a3c", "#7a5195", "#4f9d69", "#2f7ebc", "#c6b34a", "#9aa5b1", "#b8d4e8", "#e6e6e6")
_WAY_COLUMNS = ["way", "latents L2", *(f"{stage} s" for stage in ("plan", "batch", "loop", "decode", "total"))]
_WAY_COLUMNS += ["x eager", "x compile", "waits", "GiB"]
_MODELS = ("sana", "flux-kontext", "flux", "wan")


def slug(found: Mapping[str, Any]) -> str:
    """The card's name as a file has it: `h200` for "NVIDIA H200"."""
    name = found["sections"].get("card", {}).get("card", {}).get("name", "unknown")
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")


def file_name(found: Mapping[str, Any]) -> str:
    """Of the report."""
    return f"gpu-{'dry-run' if found['dry_run'] else slug(found)}.json"


def chart_name(found: Mapping[str, Any]) -> str:
    """Of the chart."""
    return f"{Path(file_name(found)).stem}.png"


def finished(found: Mapping[str, Any]) -> dict[str, Any]:
    """With the bars; a dry run measures nothing and so meets none."""
    return {**found, "bars": verdicts({} if found["dry_run"] else found["sections"])}


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The last line: the bars and where the rest is; parts were printed as they came."""
    card = found["sections"].get("card", {}).get("card", {})
    return {
        "benchmark": "gpu", "dry_run": found["dry_run"], "card": card.get("name"), "report": file_name(found),
        "bars": found["bars"],
    }  # fmt: skip


def line_of(section: str, name: str, part: Mapping[str, Any]) -> str:
    """A part of a result as it comes, in a line."""
    why = part.get("without_graph") or part.get("failed") or part.get("left_out") or part.get("skipped") or part.get("why")
    numbers = (f"{key} {_number(value)}" for key, value in part.items() if isinstance(value, int | float))
    return f"{section}: {name}: {why or ', '.join(numbers)}"


def tables(sections: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of every table that has any."""
    ceilings = sections.get("card", {})
    rows = []
    for name, key, unit, scale in (
        ("copy", "bytes_per_second", "TB/s", 1e12), ("gemm bf16", "flops_per_second", "TFLOP/s", 1e12),
        ("gemm fp8", "flops_per_second", "TFLOP/s", 1e12),
    ):  # fmt: skip
        if name in ceilings:
            value = ceilings[name].get(key)
            rows.append([name, f"{value / scale:.3g} {unit}" if value else ceilings[name].get("failed", "")])
    yield "Ceilings", ["what", "rate"], rows
    columns = ["kernel", "error", "µs", "GB/s", "of the copy", "of a copy of its size", "x eager", "x compile"]
    yield "Kernels", columns, [_kernel_row(name, part) for name, part in _parts(sections, "kernels")]
    columns = ["connector's step", "error", "eager's", "ms", "x eager", "x compile"]
    yield "Connector", columns, [_connector_row(name, part) for name, part in _parts(sections, "connector")]
    for section in SECTIONS:
        if section.name in _MODELS:
            rows = [
                _way_row(name, part) for name, part in _parts(sections, section.name) if "error" in part or "left_out" in part
            ]
            yield section.title, _WAY_COLUMNS, rows


def _parts(sections: Mapping[str, Any], section: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, part) for name, part in sections.get(section, {}).items() if name not in ("spent", "ended")]


def _kernel_row(name: str, part: Mapping[str, Any]) -> list[str]:
    if "seconds" not in part:
        return [name, part.get("failed") or part.get("skipped") or "", *[""] * 6]
    over = part["over"]
    return [
        name,
        f"{part['error']:.1e}",
        f"{1e6 * part['seconds']['ours']:.1f}",
        f"{part['bytes_per_second'] / 1e9:.0f}",
        _percent(part["share_of_copy"]) if "share_of_copy" in part else "not memory-bound",
        _percent(part["share_of_copy_of_same_size"]),
        f"{over['eager']:.2f}",
        f"{over['compile']:.2f}" if "compile" in over else "",
    ]


def _connector_row(name: str, part: Mapping[str, Any]) -> list[str]:
    if "seconds" not in part:
        return [name, part.get("failed") or part.get("skipped") or "", *[""] * 4]
    over = part["over"]
    return [
        name, f"{part['error']:.1e}", f"{part['eager_error']:.1e}", f"{1e3 * part['seconds']['ours']:.3f}",
        f"{over['eager']:.2f}", f"{over['compile']:.2f}" if "compile" in over else "",
    ]  # fmt: skip


def _way_row(name: str, part: Mapping[str, Any]) -> list[str]:
    if "seconds" not in part:
        return [name, part.get("left_out") or "checked, not timed", *[""] * 9]
    seconds = part["seconds"]
    total = f"{seconds['total']['median']:.3f}"
    if "extrapolated_seconds" in part:
        total += f" (a whole loop, extrapolated: {part['extrapolated_seconds']:.1f})"
    idle = part.get("idle_between_steps")
    stages = [f"{seconds[stage]['median']:.3f}" if stage in seconds else "" for stage in ("plan", "batch", "denoise", "decode")]
    over = [f"{part[key]:.2f}" if key in part else "" for key in ("over torch eager bf16", "over torch compile bf16")]
    if "without_graph" in part:
        name += f" (NOT CAPTURED: {part['without_graph']})"
    memory = f"{part['peak_bytes'] / 2**30:.1f}" if part.get("peak_bytes") else ""
    return [name, f"{part['error']:.1e}", *stages, total, *over, "" if idle is None else _percent(idle), memory]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:.3g}"


def print_report(found: Mapping[str, Any]) -> None:
    """The card, the tables, the bars."""
    card = found["sections"].get("card", {}).get("card", {})
    common.console.print(f"\n[bold]{card.get('name', 'no card section was run')}[/bold] {found['machine_text']}")
    for title, columns, rows in tables(found["sections"]):
        if rows:
            table = Table(title=title, title_justify="left")
            for column in columns:
                table.add_column(column)
            for row in rows:
                table.add_row(*row)
            common.console.print(table)
    for section, parts in found["sections"].items():
        if "ended" in parts:
            common.console.print(
                f"{section}: {parts['ended']['why']}", *parts["ended"].get("notes", ()), sep="\n  ", markup=False
            )
    for bar in found["bars"]:
        number = "" if bar["found"] is None else f": {bar['found']:.3g} ({bar['where']})"
        common.console.print(f"{bar['verdict']:<13} {bar['what']}{number}, wanted {bar['wanted']}", markup=False)


def chart(found: Mapping[str, Any], file: Path) -> Path | None:
    """Stacked bars of seconds by kind of kernel, a way each; None where nothing was taken apart, or without matplotlib."""
    rows = [
        (section, name, part["breakdown"], part.get("breakdown_steps", 0))
        for section in _MODELS
        for name, part in found["sections"].get(section, {}).items()
        if isinstance(part.get("breakdown"), dict)
    ]
    if not rows or find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(kind for _, _, breakdown, _ in rows for kind in breakdown))
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.42 * len(rows)), layout="constrained")
    for row, (_, _, breakdown, steps) in enumerate(rows):
        whole, left = sum(breakdown.values()) or 1.0, 0.0
        for kind, colour in zip(kinds, _COLOURS, strict=False):
            share = breakdown.get(kind, 0.0) / whole
            axes.barh(row, share, left=left, color=colour, height=0.74, label=kind if row == 0 else None)
            left += share
        axes.annotate(f" {whole:.3g} s, {steps} steps", (1.0, row), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{section}: {name}" for section, name, _, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of a request's time on the device, profiled; at the right, the seconds that are shared out")
    axes.set_title(f"where the time goes: {slug(found)}", fontsize=11, loc="left")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return file


def docs_text(reports: Sequence[Mapping[str, Any]]) -> str:
    """The generated part of docs/benchmarks.md."""
    if not reports:
        rows = [[bar["what"], bar["wanted"], NOT_ON_A_GPU] for bar in verdicts({})]
        return "\n".join(["No results yet: everything below is " + NOT_ON_A_GPU + ".", "", *_markdown(_BAR_COLUMNS, rows)])
    lines: list[str] = []
    for found in reports:
        card = found["sections"].get("card", {}).get("card", {})
        versions = ", ".join(f"{name} {card.get('versions', {}).get(name)}" for name in ("torch", "diffusers", "transformers"))
        lines += [f"### {card.get('name', 'unknown card')}, {found['date'][:10]}"]
        lines += [f"{versions}, triton {card.get('triton')}.", ""]
        rows = [[bar["what"], bar["wanted"], _found(bar)] for bar in verdicts(found["sections"])]
        lines += [*_markdown(_BAR_COLUMNS, rows), ""]
        for title, columns, body in tables(found["sections"]):
            if body:
                lines += [f"**{title}**", "", *_markdown(columns, body), ""]
        if (common.CHARTS / chart_name(found)).is_file():
            lines += [f"![where the time goes](images/{chart_name(found)})", ""]
    return "\n".join(lines).rstrip()


_BAR_COLUMNS = ["bar, on an H200", "wanted", "found"]


def _found(bar: Mapping[str, Any]) -> str:
    if bar["found"] is None:
        return NOT_ON_A_GPU
    return f"{bar['found']:.3g}, {bar['verdict']} ({bar['where']})"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [list(columns), ["---"] * len(columns), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return [f"| {' | '.join(row)} |" for row in cells]


def saved_reports(folder: Path = common.RESULTS) -> list[dict[str, Any]]:
    """All reports of this benchmark in `folder`; a dry run's are none."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("gpu-*.json"))]
    return [each for each in found if not each["dry_run"]]


def docs_with(text: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """`text` with what lies between the markers made anew."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{docs_text(reports)}\n{_END}{after}"


def write_docs() -> None:
    """Renews docs/benchmarks.md."""
    DOCS.write_text(docs_with(DOCS.read_text(encoding="utf-8"), saved_reports()), encoding="utf-8")
