"""TensorRT plans of every tiny checkpoint: whether each builds, how large it is, how long the library takes. Needs no GPU.

    python -m benchmarks.plans
    python -m benchmarks.plans --checkpoint "wan stock" --precision fp16

Writes benchmarks/results/plans.json and the table of docs/tensorrt.md, of all or of those named. Times are those of
the machine that recorded them; a plan that is in the cache is not built again.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import report
from mc_export.backbones.base import Backbone
from mc_export.build import BuildOptions, EngineChoice, State, build_bundle
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError

TARGET = "tensorrt-rtx"
RESULT = "plans"
PAGE = report.ROOT / "docs" / "tensorrt.md"
#: The columns' order; a precision that is in no row has no columns.
PRECISIONS = ("bf16", "fp16", "fp32")
_TABLE = re.compile(r"(<!-- plans -->\n).*?(<!-- /plans -->)", re.DOTALL)


@dataclass(frozen=True)
class PlanRow:
    """One plan: `library` seconds are TensorRT's, `seconds` those of loading, export and check too."""

    checkpoint: str
    component: str
    precision: str
    bytes: int
    library: float
    seconds: float
    relative_l2: float


def build_options(precision: Precision) -> BuildOptions:
    """Every engine a checkpoint can have; the encoder of pictures is left out of a bundle unless it is named."""
    choice = EngineChoice(TARGET, precision)
    return BuildOptions(target=TARGET, precision=precision, engines={"vae_encoder": choice}, max_steps=4, max_batch=2)


def plan_rows(name: str, checkpoint: Path, bundle: Path, precision: Precision) -> list[PlanRow]:
    """Builds a checkpoint's bundle.

    Raises:
        EngineError: one of its engines does not build.
    """
    built = build_bundle(checkpoint, bundle, build_options(precision))
    return [
        PlanRow(
            name, engine.component, engine.precision, engine.bytes, engine.states[State.BUILDING],
            round(sum(engine.states.values()), 2), engine.relative_l2,
        )
        for engine in built.engines
    ]  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, an engine a line, its precisions side by side."""
    precisions = [precision for precision in PRECISIONS if any(row["precision"] == precision for row in rows)]
    facts: dict[str, Callable[[dict[str, Any]], str]] = {
        "kB": lambda row: f"{row['bytes'] / 1000:.0f}",
        "library s": lambda row: f"{row['library']:.1f}",
        "whole s": lambda row: f"{row['seconds']:.0f}",
        "error of its graph": lambda row: f"{row['relative_l2']:.1e}",
    }
    head = ("checkpoint", "engine", *(f"{fact}, {precision}" for fact in facts for precision in precisions))
    lines = [head, tuple("---" for _ in head)]
    engines = dict.fromkeys((row["checkpoint"], row["component"]) for row in rows)
    found = {(row["checkpoint"], row["component"], row["precision"]): row for row in rows}
    for checkpoint, component in engines:
        own = [found.get((checkpoint, component, precision)) for precision in precisions]
        cells = ("-" if row is None else fact(row) for fact in facts.values() for row in own)
        lines.append((checkpoint, f"`{component}`", *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page_with(rows: Sequence[dict[str, Any]]) -> str:
    """docs/tensorrt.md with the table of these rows."""
    text, count = _TABLE.subn(lambda found: found[1] + table(rows) + found[2], PAGE.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{PAGE}: has {count} places for the table")
    return text


def checkpoints() -> dict[str, Callable[[Path], Path]]:
    """Of every backbone a checkpoint of MetaCanvas, with all its tasks, and the stock pipeline: by name, what writes one."""
    from tests.tiny_backbones import BACKBONES, KINDS, tiny_checkpoint

    def write(folder: Path, backbone: Backbone, kind: str) -> Path:
        return tiny_checkpoint(folder, backbone, kind)

    return {f"{backbone.name} {kind}": partial(write, backbone=backbone, kind=kind) for backbone in BACKBONES for kind in KINDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status is the number of checkpoints that failed."""
    named = checkpoints()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", choices=list(named))
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--results", type=Path, help="where the report goes, and no table; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    found_rows: list[PlanRow] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.checkpoint or named:
            place = Path(folder) / name.replace(" ", "-")
            checkpoint = named[name](place / "checkpoint")
            try:
                found = plan_rows(name, checkpoint, place / "bundle", Precision(arguments.precision))
            except EngineError as error:
                failed[name] = str(error)
                report.console.print(f"{name}: {error}", markup=False, style="red")
                continue
            found_rows += found
            report.console.print(table([asdict(row) for row in found]), markup=False)
    asked = list(arguments.checkpoint or named)
    before = [] if arguments.results else recorded()
    kept = [row for row in before if row["checkpoint"] not in asked or row["precision"] != arguments.precision]
    rows = sorted(kept + [asdict(row) for row in found_rows], key=lambda row: list(named).index(row["checkpoint"]))
    result = {"benchmark": RESULT, **report.card(), "rows": rows, "failed": failed}
    report.save(RESULT, result, arguments.results)
    if arguments.results is None:
        PAGE.write_text(page_with(rows), encoding="utf-8")
    return len(failed)


def recorded() -> list[dict[str, Any]]:
    """The rows of benchmarks/results; none where there is no such file yet."""
    try:
        text = (report.RESULTS / f"{RESULT}.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
