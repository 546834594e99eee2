"""SANA-1.6B at 1024 px, full width and depth, random weights: build it, run a few steps, and say what memory that takes.

    python -m benchmarks.real
    python -m benchmarks.real --size real-3b --build-only

Every run is a process of its own, one after the other: two such models do not fit beside each other. `real` has the published
SANA-1.6B and DC-AE f32c32 behind a planner of Qwen2.5-VL-3B's width with 2 of its 36 layers; `real-3b` has all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import process, report
from benchmarks.checkpoints import work_folder

PROMPT = "a red circle left of a blue square"
TORCH = ("torch eager fp32", "torch eager bf16")
BUNDLES = ("onnxruntime:fp32", "openvino:bf16")
KEEP_FREE = 1 << 30


def measure(size: str, work: Path, bundles: Sequence[str], steps: int, threads: int, runs: bool) -> dict[str, Any]:
    """Make the checkpoint, build, run. What does not fit is in the report with the memory at which it was ended."""
    card = report.card() | {"available_memory": process.available_memory()}
    made = [sys.executable, "-W", "ignore", "-m", "benchmarks.checkpoints", "--size", size, "--work", str(work)]
    parts: dict[str, Any] = {"checkpoint": _measured(made)}
    checkpoint = work / f"{size}-metacanvas"
    for name in bundles:
        target, precision = name.split(":")
        bundle = work / "bundles" / f"{size}-{target}-{precision}"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        options = ["--target", target, "--precision", precision, "--max-batch", "1", "--json"]
        parts[f"build {name}"] = _measured(process.mc_runtime("build", checkpoint, "-o", bundle, *options), _build_report)
        if runs and "failed" not in parts[f"build {name}"]:
            parts[f"run {name}"] = _child("bundle", bundle, steps, threads)
    for name in TORCH if runs else ():
        parts[f"run {name}"] = _child(name, checkpoint, steps, threads)
    stamp = checkpoint / "benchmark.json"
    return {
        "benchmark": "real",
        "size": size,
        **card,
        "request": {"prompt": PROMPT, "steps": steps, "guidance": 4.5, "threads": threads},
        "parameters": json.loads(stamp.read_text())["parameters"] if stamp.is_file() else None,
        "parts": parts,
    }


def _measured(command: Sequence[str], parse: Callable[[str], Any] | None = None) -> dict[str, Any]:
    report.console.print(" ".join(map(str, command))[:160], style="dim")
    try:
        ran = process.run(command, keep_free=KEEP_FREE)
    except RuntimeError as error:
        return {"failed": str(error)}
    found = {"seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
    return found | ({"report": parse(ran.output)} if parse else {})


def _build_report(text: str) -> dict[str, Any]:
    """The build's report without the folder, which is this machine's own."""
    report: dict[str, Any] = json.loads(text)
    return report | {"bundle": Path(report["bundle"]).name}


def _child(what: str, path: Path, steps: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.real", "--child", what, str(path)]
    command += ["--steps", str(steps), "--threads", str(threads)]
    return _measured(command, lambda text: json.loads(text.splitlines()[-1]))


def run_child(what: str, path: Path, steps: int, threads: int) -> dict[str, Any]:
    """In a process of its own: one picture of few steps; seconds to load, plan, each step, decode."""
    start = time.perf_counter()
    if what == "bundle":
        from mc_runtime import Runtime

        runtime = Runtime.load(path, threads=threads, verify=False)
        runtime.warm_up()
        load = time.perf_counter() - start
        each: list[float] = []
        result = runtime.generate(PROMPT, steps=steps, guidance_scale=4.5, on_step=lambda step: each.append(step.seconds))
        timings = dict(result.timings)
        return {"load": load, "plan": timings["plan"], "steps": each, "decode": timings["decode"]}

    import torch

    from benchmarks.contestants import DTYPES, TimedReference
    from mc_export.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    pipeline = TimedReference(load_checkpoint(path), DTYPES[what.split()[-1]])
    load = time.perf_counter() - start
    pipeline.generate(PROMPT, steps=steps, guidance_scale=4.5)
    seconds = pipeline.seconds
    return {"load": load, "plan": seconds["plan"], "steps": pipeline.step_seconds, "decode": seconds["decode"]}


def print_result(result: dict[str, Any]) -> None:
    """A line a part."""
    report.console.print(f"\n[bold]{result['size']}[/bold] on {result['machine_text']}")
    parameters = result["parameters"] or {}
    report.console.print(", ".join(f"{name} {count / 1e6:.0f} M" for name, count in parameters.items()))
    for name, part in result["parts"].items():
        if "failed" in part:
            report.console.print(f"{name:<28} [red]failed[/red]: {part['failed'][-300:]}")
            continue
        line = f"{name:<28}{part['seconds']:8.1f} s{part['peak_bytes'] / 2**30:8.1f} GiB at most"
        found = part.get("report", {})
        if "steps" in found:
            # The first step warms the engines up.
            step = statistics.median(found["steps"][1:] or found["steps"])
            line += f"   load {found['load']:.1f} s, plan {found['plan']:.1f}, a step {step:.2f}, decode {found['decode']:.1f}"
        report.console.print(line)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["real", "real-3b", "mid"], default="real")
    parser.add_argument("--bundle", action="append", help=f"TARGET:PRECISION, again for another; {', '.join(BUNDLES)}")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        what, path = arguments.child
        print(json.dumps(run_child(what, Path(path), arguments.steps, arguments.threads)))
        return None
    work = work_folder(arguments.work)
    bundles = arguments.bundle or BUNDLES
    result = measure(arguments.size, work, bundles, arguments.steps, arguments.threads, not arguments.build_only)
    print_result(result)
    report.save(arguments.size if arguments.size != "mid" else "real-mid", result, arguments.results)
    return result


if __name__ == "__main__":
    main()
