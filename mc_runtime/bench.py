"""How fast a bundle is, stage by stage, and against the torch reference in the same run.

The numbers are checked before anything is timed: both contestants denoise the same initial noise, and the difference of
their final latents goes into the report. Then every round runs each contestant once, in an order shuffled anew, so that a
machine that warms up or is busy for a while slows both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mc_runtime.errors import EngineError
from mc_runtime.machine import installed_versions, this_machine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mc_runtime.runtime.runtime import Runtime

AGAINST = ("eager", "compile")

#: Largest relative L2 difference of the final latents at which two contestants still draw the same picture.
MOST_DIFFERENCE = {"fp32": 0.02, "fp16": 0.2, "bf16": 0.5, "int8": 0.7}


@dataclass(frozen=True)
class BenchRequest:
    """The picture or video that every contestant makes; None is the bundle's default.

    Attributes:
        size: (height, width) in pixels.
        media: what else `Runtime.generate` is given: `task`, `image`, `video`, `frames` and so on.
    """

    prompt: str
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    threads: int | None = None
    device: str | None = None
    fallback: str | None = None
    media: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `Runtime.generate`, and of the torch reference's, but for the prompt."""
        return {
            "steps": self.steps, "guidance_scale": self.guidance, "seed": self.seed, "size": self.size, **self.media,
        }  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; pictures and clips by their kind."""
        media = {name: one if isinstance(one, (str, int, float)) else _named(one) for name, one in self.media.items()}
        return {**self.__dict__, "size": list(self.size or ()), "media": media}


class Contestant(Protocol):
    """Something that draws the picture."""

    name: str

    def latents(self) -> NDArray[np.float32]:
        """Final latents [1, C, H, W] of the request."""
        ...

    def draw(self) -> dict[str, float]:
        """Draw the picture once; seconds per stage."""
        ...


class BundleContestant:
    """The bundle's engines; a plan is made anew for every picture."""

    name = "bundle"

    def __init__(self, runtime: Runtime, request: BenchRequest) -> None:
        self.runtime = runtime
        self._arguments = request.arguments
        self._prompt = request.prompt

    def latents(self) -> NDArray[np.float32]:
        """Final latents [1, C, H, W]."""
        result = self.runtime.generate(self._prompt, output="latents", **self._arguments)
        assert result.latents is not None
        return result.latents

    def draw(self) -> dict[str, float]:
        """Draw once, planner included."""
        self.runtime.forget_plans()
        return dict(self.runtime.generate(self._prompt, **self._arguments).timings)


class TorchContestant:
    """The reference pipeline in fp32, eager or with its backbone compiled."""

    def __init__(self, checkpoint: str, request: BenchRequest, *, compiled: bool) -> None:
        import torch

        from mc_export.reference.pipeline import ReferencePipeline

        if request.threads is not None:
            torch.set_num_threads(request.threads)
        self.name = "compile" if compiled else "eager"
        self._pipeline = ReferencePipeline.from_checkpoint(checkpoint)
        if compiled:
            self._pipeline.backbone = torch.compile(self._pipeline.backbone)
        self._arguments = request.arguments
        self._prompt = request.prompt

    def latents(self) -> NDArray[np.float32]:
        """Final latents [1, C, H, W]."""
        found: NDArray[np.float32] = self._pipeline.generate(self._prompt, output="latents", **self._arguments).latents
        return found

    def draw(self) -> dict[str, float]:
        """Draw once; the reference does not tell its stages apart."""
        start = time.perf_counter()
        self._pipeline.generate(self._prompt, **self._arguments)
        return {"everything": time.perf_counter() - start}


def run_bench(
    path: Path,
    request: BenchRequest,
    *,
    runs: int = 10,
    against: Sequence[str] = (),
    checkpoint: str | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check, then time. Returns the report, JSON-ready, with the machine it comes from.

    `against` names torch contestants ("eager", "compile") made from `checkpoint`. Raises EngineError where a contestant
    does not draw the bundle's picture.
    """
    from mc_runtime.runtime.runtime import Runtime

    start = time.perf_counter()
    runtime = Runtime.load(path, threads=request.threads, device=request.device, fallback=request.fallback)
    load_seconds = time.perf_counter() - start
    manifest = runtime.manifest
    # An explicit size for all: the bundle's default may differ from the checkpoint's.
    request = _with_defaults(request, manifest)
    bundle = BundleContestant(runtime, request)
    rivals: list[Contestant] = [TorchContestant(str(checkpoint), request, compiled=name == "compile") for name in against]
    precisions = {component: str(engine.precision) for component, engine in manifest.engines.items()}
    checks = _check(bundle, rivals, precisions)
    times = time_rounds([bundle, *rivals], runs, on_round)
    report: dict[str, Any] = {
        "bundle": {
            "name": manifest.name,
            "checkpoint": manifest.checkpoint.sha256,
            "engines": {
                component: f"{engine.target}:{engine.precision}" for component, engine in sorted(manifest.engines.items())
            },
        },
        "request": request.as_dict(),
        "runs": runs,
        "load_seconds": load_seconds,
        "check": checks,
        "results": {name: summary_of(rounds) for name, rounds in times.items()},
        "machine": this_machine().as_dict(),
        "machine_text": str(this_machine()),
        "versions": installed_versions(),
    }
    own = report["results"]["bundle"]["total"]["median"]
    report["host_share"] = 1 - statistics.median(each["engines"] / each["total"] for each in times["bundle"])
    report["speedup"] = {rival.name: report["results"][rival.name]["total"]["median"] / own for rival in rivals}
    return report


def _with_defaults(request: BenchRequest, manifest: Any) -> BenchRequest:
    return replace(
        request,
        size=request.size or tuple(manifest.sizes.default),
        steps=manifest.steps.default if request.steps is None else request.steps,
        guidance=manifest.guidance.default if request.guidance is None else request.guidance,
    )


def _named(media: Any) -> str:
    """A picture or clip, or several, as a report names them."""
    if isinstance(media, (list, tuple)):
        return ", ".join(_named(one) for one in media)
    return str(media) if isinstance(media, Path) else type(media).__name__


def _check(bundle: Contestant, rivals: Sequence[Contestant], precisions: dict[str, str]) -> dict[str, dict[str, float]]:
    """Largest absolute and relative L2 difference of the final latents, by rival; also everybody's warm-up."""
    bundle.draw()
    ours = bundle.latents().astype(np.float64)
    limit = max(MOST_DIFFERENCE.get(precision, 1.0) for precision in precisions.values())
    found = {}
    for rival in rivals:
        rival.draw()
        theirs = rival.latents().astype(np.float64)
        if theirs.shape != ours.shape:
            raise EngineError(
                f"{rival.name} gives latents {theirs.shape}, the bundle {ours.shape}; was it built from this checkpoint?"
            )
        relative = float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-12))
        if not relative <= limit:
            raise EngineError(
                f"the bundle's latents differ from {rival.name}'s by {relative:.3g} (relative L2; at most {limit:g} is the "
                "same picture); was it built from this checkpoint? Build it again with `mc-runtime build`"
            )
        found[rival.name] = {"relative_l2": relative, "max_abs": float(np.abs(ours - theirs).max())}
    return found


def time_rounds(
    contestants: Sequence[Contestant], runs: int, on_round: Callable[[int, int], None] | None
) -> dict[str, list[dict[str, float]]]:
    """Seconds per stage of every round, by contestant; the order within a round is shuffled (seeded)."""
    order = random.Random(0)
    times: dict[str, list[dict[str, float]]] = {each.name: [] for each in contestants}
    for index in range(runs):
        for contestant in order.sample(contestants, len(contestants)):
            start = time.perf_counter()
            stages = contestant.draw()
            times[contestant.name].append(stages | {"total": time.perf_counter() - start})
        if on_round is not None:
            on_round(index + 1, runs)
    return times


def summary_of(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest round in seconds, by stage."""
    stages = dict.fromkeys(stage for each in rounds for stage in each)
    seconds = {stage: [each.get(stage, 0.0) for each in rounds] for stage in stages}
    return {
        stage: {"median": statistics.median(times), "min": min(times), "max": max(times)} for stage, times in seconds.items()
    }


def chart_from_report(report: dict[str, Any], path: Path) -> None:
    """Draw a report as bars, the bundle's stages end to end and each rival beside it. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    names = list(results)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(names)), layout="constrained")
    for row, name in enumerate(names):
        stages = {key: value["median"] for key, value in results[name].items() if key not in ("total", "engines")}
        left = 0.0
        for stage, median in stages.items():
            label = stage if name == "bundle" else None
            axes.barh(row, median, left=left, label=label, color=None if name == "bundle" else "0.6")
            left += median
        axes.annotate(f" {results[name]['total']['median']:.3g} s", (left, row), va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds a picture (median)")
    axes.set_title(f"{report['bundle']['name']} on {report['machine']['cpu']}", fontsize=10)
    axes.legend(fontsize=8, ncols=4)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
