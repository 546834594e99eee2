"""A picture end to end and stage by stage: bundles against the torch reference and optimum-onnx, interleaved in one run.

    python -m benchmarks.end_to_end --size mid
    python -m benchmarks.end_to_end --size mid --stock --optimum-python ~/optimum/bin/python
    python -m benchmarks.end_to_end --size demo
    python -m benchmarks.end_to_end --size mid-wan

Every contestant first draws the same picture from the same noise; how far it is from torch's in fp32 goes into the report.
Then every round runs each of them once in an order shuffled anew.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import mid, models, report, tiny
from benchmarks.bundles import QUICK, SUBJECT_VARIANTS, VARIANTS, build_variant, variant_folder
from benchmarks.checkpoints import long_prompt, metacanvas_checkpoint, stock_checkpoint, subject_checkpoint, work_folder
from benchmarks.contestants import BundleRival, Drawn, Environment, OptimumRival, Rival, TorchRival, noise_of
from mc_export.checkpoint import load_checkpoint
from mc_runtime.bench import BenchRequest, summary_of, time_rounds
from mc_runtime.errors import McRuntimeError

EAGER = "torch eager fp32"
#: A precision passes where its picture is within this mean difference per channel, of 255: two per cent.
PICTURE_GATE = 5.1
#: Wanted on *mid* with its MetaCanvas checkpoint, as medians of per-round ratios to eager fp32.
LEAST_RATIO = {"onnxruntime int8": 1.8, "onnxruntime fp32": 1.05}
LEAST_BEST_OPENVINO = 4.0
MOST_HOST_SHARE = 0.02
SIZES = ("demo", *(f"{size}{name}" for size in ("mid", "tiny") for name in ("", *(f"-{name}" for name in mid.SUBJECTS))))
#: What the stock pipeline is timed with besides eager torch and optimum-onnx.
STOCK = ("onnxruntime fp32", "openvino mixed")


@dataclass(frozen=True)
class Plan:
    """What one run measures."""

    size: str
    stock: bool = False
    rounds: int = 3
    threads: int = 2
    steps: int = 20
    work: Path | None = None
    optimum: Environment | None = None
    variants: tuple[str, ...] = tuple(VARIANTS)
    torch: tuple[str, ...] = ("eager fp32", "eager bf16", "compile fp32", "compile bf16")
    wait_for: Path | None = None
    as_built: bool = False

    @property
    def name(self) -> str:
        """Of the report's file."""
        return f"{self.size}-stock" if self.stock else self.size

    @property
    def subject(self) -> mid.Subject | None:
        """The backbone beside SANA that is timed, if it is one of those."""
        return mid.SUBJECTS.get(self.size.partition("-")[2])


def measure(plan: Plan) -> dict[str, Any]:
    """Build, check, time; the report."""
    work = work_folder(plan.work)
    checkpoint, request = _subject(plan, work)
    torch.set_num_threads(plan.threads)
    left_out: dict[str, str] = {}
    builds: dict[str, Any] = {}
    rivals = _contestants(plan, work, checkpoint, request, builds, left_out)
    checks = _check(rivals, left_out)
    rivals = [rival for rival in rivals if rival.name in checks]
    _wait(plan.wait_for)
    card = report.card()
    rounds = time_rounds(rivals, plan.rounds, lambda done, total: report.console.print(f"round {done} of {total}", style="dim"))
    result = {
        "benchmark": "end_to_end",
        "checkpoint": plan.name,
        **card,
        "load_after": os.getloadavg()[0],
        "request": request.as_dict(),
        "rounds": plan.rounds,
        "parameters": _parameters(checkpoint),
        "contestants": {rival.name: _entry(rival, rounds, checks) for rival in rivals},
        "builds": builds,
        "left_out": left_out,
    }
    for rival in rivals:
        if isinstance(rival, OptimumRival):
            rival.close()
    result["bars"] = bars(result)
    return result


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The requirements that this run can answer."""
    contestants = result["contestants"]
    found = [
        report.bar(f"{name}, share of the host between engine calls", entry["host_share"], at_most=MOST_HOST_SHARE)
        for name, entry in contestants.items()
        if "host_share" in entry and result["checkpoint"] != "demo"
    ]
    if subject := mid.SUBJECTS.get(result["checkpoint"].removeprefix("mid-")):
        return found + _best_bar(contestants, "", subject.least_ratio)
    if result["checkpoint"] != "mid":
        return found
    for name, least in LEAST_RATIO.items():
        if name in contestants:
            found.append(report.bar(f"{name} against {EAGER}", contestants[name]["ratio"], at_least=least))
    return found + _best_bar(contestants, "openvino", LEAST_BEST_OPENVINO)


def best_bundle(contestants: Mapping[str, Any], target: str = "") -> str | None:
    """The fastest bundle of a target (of any, if empty) whose picture passes."""
    passing = {
        name: entry["ratio"]
        for name, entry in contestants.items()
        if "host_share" in entry and name.startswith(target) and entry["check"]["picture_mean_error"] <= PICTURE_GATE
    }
    return max(passing, key=lambda name: passing[name]) if passing else None


def _best_bar(contestants: Mapping[str, Any], target: str, least: float) -> list[dict[str, Any]]:
    """The best bundle against what is wanted of it."""
    best = best_bundle(contestants, target)
    if best is None:
        return []
    what = f"{best} (best{f' {target}' if target else ''}) against {EAGER}"
    return [report.bar(what, contestants[best]["ratio"], at_least=least)]


def _subject(plan: Plan, work: Path) -> tuple[Path, BenchRequest]:
    """The checkpoint and the picture that everybody draws."""
    request = BenchRequest(prompt="a red circle left of a blue square", steps=plan.steps, guidance=4.5, threads=plan.threads)
    if plan.size == "demo":
        checkpoint = report.ROOT / "examples" / "shapes" / "checkpoint"
    elif plan.size.startswith("tiny"):
        checkpoint = tiny.checkpoint(plan.size.partition("-")[2] or "sana", work, stock=plan.stock)
        request = replace(request, media=tiny.media(plan.subject))
    elif plan.subject is not None:
        subject = plan.subject
        checkpoint = subject_checkpoint(subject, work)
        steps = min(plan.steps, subject.steps)
        request = replace(request, prompt=models.WORDS, steps=steps, media=subject.media, size=subject.size)
    else:
        size = models.SIZES[plan.size]
        checkpoint = (stock_checkpoint if plan.stock else metacanvas_checkpoint)(size, work)
        request = replace(request, prompt=long_prompt(size))
    opened = load_checkpoint(checkpoint)
    guidance = request.guidance if opened.backbone.name == "sana" else opened.defaults.guidance_scale
    return checkpoint, replace(request, size=request.size or opened.default_size, guidance=guidance)


def _contestants(
    plan: Plan, work: Path, checkpoint: Path, request: BenchRequest, builds: dict[str, Any], left_out: dict[str, str]
) -> list[Rival]:
    """All that can be had; why not goes into `left_out`. Eager fp32, the yardstick, is first."""
    rivals: list[Rival] = []
    for name in plan.torch:
        mode, precision = name.split()
        rivals.append(TorchRival(checkpoint, request, precision, compiled=mode == "compile"))
    for name in plan.variants:
        folder = variant_folder(name, checkpoint, work)
        try:
            if not (plan.as_built and folder.is_dir()):
                built = build_variant(name, checkpoint, work, lambda line: report.console.print(line, style="dim"))
                engines = [asdict(engine) | {"state": str(engine.state)} for engine in built.engines]
                builds[name] = {"seconds": built.seconds, "bytes": built.bytes, "engines": engines}
            rivals.append(BundleRival(name, folder, request))
        except Exception as error:  # the libraries raise of all kinds; one bundle that cannot be had leaves the others
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if plan.optimum is not None:
        opened = load_checkpoint(checkpoint)
        noise = noise_of(request, opened.backbone.latent_channels(opened.model_config), opened.pixels_per_latent)
        rivals.append(OptimumRival(plan.optimum, checkpoint, work / f"{checkpoint.name}-optimum", request, noise))
    elif plan.stock:
        left_out["optimum-onnx"] = "no environment with it was named (--optimum-python)"
    return rivals


def _check(rivals: Sequence[Rival], left_out: dict[str, str]) -> dict[str, dict[str, float]]:
    """How far everybody's picture is from the first one's; also everybody's warm-up."""
    reference: Drawn | None = None
    found = {}
    for rival in rivals:
        start = time.perf_counter()
        try:
            drawn = rival.picture()
        except (McRuntimeError, RuntimeError) as error:  # torch.compile raises RuntimeErrors of its own
            left_out[rival.name] = " ".join(str(error).split())[:300]
            continue
        reference = reference or drawn
        found[rival.name] = difference(drawn, reference) | {"warm_up_seconds": time.perf_counter() - start}
        report.console.print(f"{rival.name}: {found[rival.name]}", style="dim")
    return found


def difference(drawn: Drawn, reference: Drawn) -> dict[str, float]:
    """Of the final latents, and of the picture in levels of 255. Raises ValueError for another shape or not finite numbers."""
    if drawn.latents.shape != reference.latents.shape or not np.isfinite(drawn.latents).all():
        raise ValueError(f"latents {drawn.latents.shape} cannot be compared with the reference's {reference.latents.shape}")
    ours, theirs = drawn.latents.astype(np.float64), reference.latents.astype(np.float64)
    pixels = np.abs(drawn.pixels.astype(np.float64) - reference.pixels)
    return {
        "latents_relative_l2": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)),
        "latents_max_abs": float(np.abs(ours - theirs).max()),
        "picture_mean_error": float(pixels.mean()),
        "picture_max_error": float(pixels.max()),
    }


def _entry(rival: Rival, rounds: dict[str, list[dict[str, float]]], checks: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One contestant's part of the report; the ratio is the median over rounds of eager's seconds by its own."""
    own, eager = rounds[rival.name], rounds[EAGER]
    ratios = [theirs["total"] / ours["total"] for ours, theirs in zip(own, eager, strict=True)]
    entry: dict[str, Any] = {
        "seconds": summary_of(own),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "check": checks[rival.name],
    }
    if isinstance(rival, BundleRival):
        entry["engines"] = rival.engines
        entry["engine_errors"] = rival.engine_errors
        entry["host_share"] = 1 - statistics.median(each["engines"] / each["total"] for each in own)
    if isinstance(rival, OptimumRival):
        entry["versions"] = rival.versions
    return entry


def _parameters(checkpoint: Path) -> dict[str, int] | None:
    stamp = checkpoint / "benchmark.json"
    if not stamp.is_file():
        return None
    import json

    found: dict[str, int] = json.loads(stamp.read_text())["parameters"]
    return found


def _wait(file: Path | None) -> None:
    """Until `file` is there: whoever shares the machine makes it when it is quiet."""
    while file is not None and not file.exists():
        time.sleep(2)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--stock", action="store_true", help="the stock SanaPipeline of the size, without a canvas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--variants", help=f"comma-separated: {', '.join(VARIANTS)}")
    parser.add_argument("--torch", help="comma-separated: eager fp32, eager bf16, compile fp32, compile bf16")
    parser.add_argument("--optimum-python", type=Path, help="interpreter of an environment with optimum-onnx")
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    parser.add_argument("--wait-for", type=Path, help="time only once this file exists")
    parser.add_argument("--as-built", action="store_true", help="time the bundles that are there, current or not")
    parser.add_argument("--quick", action="store_true", help="one round of few steps with few contestants; proves that it runs")
    arguments = parser.parse_args(argv)
    plan = Plan(
        size=arguments.size, stock=arguments.stock, rounds=arguments.rounds, threads=arguments.threads, steps=arguments.steps,
        work=arguments.work, wait_for=arguments.wait_for, as_built=arguments.as_built,
        optimum=Environment(arguments.optimum_python) if arguments.optimum_python else None,
    )  # fmt: skip
    if arguments.stock:
        plan = replace(plan, variants=STOCK, torch=("eager fp32",))
    if plan.subject is not None:
        plan = replace(plan, variants=SUBJECT_VARIANTS, torch=("eager fp32", "eager bf16", "compile fp32"))
    if arguments.quick:
        plan = replace(plan, rounds=1, steps=2, variants=QUICK, torch=("eager fp32",))
    if arguments.variants is not None:
        plan = replace(plan, variants=tuple(filter(None, arguments.variants.split(","))))
    if arguments.torch:
        plan = replace(plan, torch=tuple(arguments.torch.split(",")))
    result = measure(plan)
    report.print_table(result)
    if not arguments.quick:
        report.chart(result, (arguments.results or report.CHARTS) / f"speed-{plan.name}.png")
    report.save(f"{plan.name}-quick" if arguments.quick else plan.name, result, arguments.results)
    return result


if __name__ == "__main__":
    main()
