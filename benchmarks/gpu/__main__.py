"""What mc-runtime does on an NVIDIA GPU.

    python -m benchmarks.gpu                          everything, in under ten minutes
    python -m benchmarks.gpu --sections sana,flux     some sections; they share the time
    python -m benchmarks.gpu --sections flux --packages   a package of FLUX's step too, which takes minutes to compile
    python -m benchmarks.gpu --dry-run                on a CPU at tiny sizes: proves that the script runs; its times say nothing
    python -m benchmarks.gpu --docs                   only write the tables of docs/benchmarks.md anew from the results

Every part of a result is written and printed (a line of JSON) as soon as it is there, so that a run that is ended keeps it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report as common
from benchmarks.gpu import report
from benchmarks.gpu.run import run_sections, serve, write
from benchmarks.gpu.sections import SECTIONS

BUDGET = 540.0  # seconds; leaves a ten-minute limit room for imports from a cold disk and for the last lines


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Command line."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(names), help=f"comma-separated: {', '.join(names)}")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for all sections together")
    parser.add_argument("--packages", action="store_true", help="compile packages of the large models' steps too")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny; its report goes to a temporary folder")
    parser.add_argument("--trace", action="store_true", help="in a dry run, also trace what would be compiled: a minute")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    parser.add_argument("--docs", action="store_true", help="only renew docs/benchmarks.md from the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--build-package", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve()
    elif arguments.build_package:
        from benchmarks.gpu.engines import build_package

        build_package(arguments.build_package, arguments.folder, dry=arguments.dry_run)
    elif arguments.docs:
        report.write_docs()
    else:
        asked = [name.strip() for name in arguments.sections.split(",") if name.strip()]
        if unknown := sorted(set(asked) - set(names)):
            parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(names)}")
        if not arguments.dry_run:
            _require_gpu(parser)
        return _measure(arguments, asked)
    return None


def _require_gpu(parser: argparse.ArgumentParser) -> None:
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU here; measure on a machine with one, or prove the script with --dry-run")


def _measure(arguments: argparse.Namespace, asked: Sequence[str]) -> dict[str, Any]:
    folder = arguments.results or (Path(tempfile.mkdtemp()) if arguments.dry_run else common.RESULTS)
    found: dict[str, Any] = {
        "benchmark": "gpu", "dry_run": arguments.dry_run, **common.card(), "budget": arguments.budget, "sections": {},
    }  # fmt: skip

    def heard(section: str, name: str, part: dict[str, Any]) -> None:
        found["sections"].setdefault(section, {})[name] = part
        common.console.print(report.line_of(section, name, part), markup=False, style="dim")
        print(json.dumps({"section": section, "part": name, "result": part}, ensure_ascii=False), flush=True)
        write(folder / report.file_name(found), found)

    run_sections(asked, arguments.budget, heard, packages=arguments.packages, dry=arguments.dry_run, trace=arguments.trace)
    found = report.finished(found)
    report.print_report(found)
    elsewhere = arguments.dry_run or arguments.results is not None
    report.chart(found, (folder if elsewhere else common.CHARTS) / report.chart_name(found))
    write(folder / report.file_name(found), found)
    if not elsewhere:
        report.write_docs()
    print(json.dumps(report.summary(found), ensure_ascii=False), flush=True)
    return found


if __name__ == "__main__":
    main()
