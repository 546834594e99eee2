"""From a checkpoint to a bundle."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import mc_runtime
from mc_export.build.cache import build_entry, content_key, copy_files, library_versions, lookup, sweep_cache
from mc_export.build.contents import EMPTY_PLAN_FILE, write_empty_plan, write_prompting, write_sampler
from mc_export.build.engine import engine_of_notes, make_engine
from mc_export.build.limits import refuse_limited
from mc_export.build.options import BuildOptions
from mc_export.build.parts import Part, facts_of, frames_of, limits_of, parts_of, sizes_of
from mc_export.build.progress import BUNDLE, ProgressCallback, ProgressLog, State
from mc_export.checkpoint.load import Checkpoint, load_checkpoint
from mc_export.lower import Calibration, target_facts
from mc_export.lower.onnx import OPSET
from mc_runtime.bundle.atomic import staged_directory
from mc_runtime.bundle.machine import machine_for
from mc_runtime.bundle.manifest import (
    MANIFEST_FILE,
    Canvas,
    Engine,
    Guidance,
    Latents,
    Manifest,
    PromptingSet,
    Sampler,
    Sizes,
    Steps,
)
from mc_runtime.bundle.manifest import Checkpoint as Origin
from mc_runtime.bundle.store import describe_files, open_bundle, write_manifest
from mc_runtime.errors import BundleError
from mc_runtime.tasks.registry import default_request

ENGINES = "engines"


@dataclass(frozen=True)
class EngineReport:
    """How one engine came about: `cached` or `built`, in how many seconds, how exact and how large."""

    component: str
    target: str
    precision: str
    state: str
    seconds: float
    max_abs: float
    relative_l2: float
    bytes: int


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: the bundle.
        unchanged: the same bundle was there already.
        engines: one report an engine.
        seconds: the whole build.
        bytes: the whole bundle.
    """

    path: Path
    unchanged: bool
    engines: tuple[EngineReport, ...]
    seconds: float
    bytes: int

    @property
    def why(self) -> str:
        """One line: what was built, and what was not and why."""
        built = [engine.component for engine in self.engines if engine.state == State.BUILT]
        cached = [engine.component for engine in self.engines if engine.state == State.CACHED]
        parts = [f"built {', '.join(built)}"] if built else []
        if cached:
            parts.append(f"{', '.join(cached)} unchanged: from the cache")
        return ("the same bundle was there already; " if self.unchanged else "") + "; ".join(parts)


def build_bundle(
    checkpoint: str | Path, output: str | Path, options: BuildOptions | None = None, progress: ProgressCallback | None = None
) -> BuildReport:
    """Builds a bundle at `output`, whole or not at all; engines come from the cache where nothing they are made of changed.

    A bundle that is there already is replaced in one step; any other folder is refused.

    Raises:
        CheckpointError: the checkpoint is not there or not whole.
        RequestError: the options ask for what this checkpoint cannot do.
        EngineError: an engine cannot be made, or its error exceeds the tolerance of its precision.
        OutputError: the output cannot be written, is something else than a bundle, or the disk is full.
    """
    start = time.monotonic()
    options = options or BuildOptions()
    opened = load_checkpoint(checkpoint)
    sweep_cache()
    with staged_directory(output, marker=MANIFEST_FILE) as stage:
        manifest, reports = _fill(stage, opened, options, progress)
        before = _manifest_at(Path(output))
        unchanged = before is not None and replace(manifest, created=before.created) == before
        manifest = before if unchanged and before is not None else manifest
        write_manifest(stage, manifest)
    size = sum(file.bytes for file in manifest.files.values())
    return BuildReport(Path(output), unchanged, reports, time.monotonic() - start, size)


def _fill(
    stage: Path, checkpoint: Checkpoint, options: BuildOptions, progress: ProgressCallback | None
) -> tuple[Manifest, tuple[EngineReport, ...]]:
    """Writes everything but the manifest into `stage`."""
    sizes = sizes_of(checkpoint, options)
    prompting = write_prompting(checkpoint, stage)
    sampler = write_sampler(checkpoint, sizes, options, stage)
    limits = limits_of(checkpoint, sizes, prompting, options, sampler.order)
    parts = parts_of(checkpoint, limits, options)
    refuse_limited(checkpoint.backbone, [part.component for part in parts], options)
    log = ProgressLog(progress, [(part.component, options.choice(part.component).is_quantized) for part in parts])
    hashes: dict[str, str] = {}
    engines: dict[str, Engine] = {}
    reports: list[EngineReport] = []
    keys: list[str] = []
    for part in parts:
        facts = facts_of(part, checkpoint, limits, hashes)
        key, engine, report = _place_engine(stage, part, facts, checkpoint, options, log)
        keys.append(key)
        engines[part.component] = engine
        reports.append(report)
    log.enter(BUNDLE, State.WRITING)
    manifest = _manifest(stage, checkpoint, options, sizes, prompting, sampler, engines)
    if default_request(manifest, prompt="") is None:
        return manifest, tuple(reports)  # a plan of these tasks has a picture or a video in it
    write_empty_plan(stage, manifest, [*keys, *(file.sha256 for file in manifest.files.values())], options.force)
    return replace(manifest, empty_plan=EMPTY_PLAN_FILE, files=describe_files(stage)), tuple(reports)


def _place_engine(
    stage: Path, part: Part, facts: dict[str, object], checkpoint: Checkpoint, options: BuildOptions, log: ProgressLog
) -> tuple[str, Engine, EngineReport]:
    """Copies one engine into the bundle, building it first if the cache has none."""
    start = time.monotonic()
    choice = options.choice(part.component)
    graph_key = "" if options.force else content_key({**facts, "graph": OPSET})
    facts = {**facts, "target": choice.target, "precision": choice.precision, **target_facts(choice.target)}
    if choice.is_quantized:
        facts["calibrated_on"] = checkpoint.sha256
    key = content_key(facts)

    def calibrate(component: str) -> Calibration:
        from mc_export.quantize.calibration import calibration_inputs

        inputs: Calibration = calibration_inputs(checkpoint, component)
        return inputs

    entry = None if options.force else lookup(key)
    state = State.CACHED if entry else State.BUILT
    entry = entry or build_entry(
        key, lambda directory: make_engine(part, choice, directory, partial(log.enter, part.component), calibrate, graph_key)
    )
    copy_files(entry, stage / ENGINES)
    log.enter(part.component, state)
    engine = engine_of_notes(entry.notes, ENGINES)
    assert engine.error is not None
    report = EngineReport(
        component=part.component,
        target=engine.target,
        precision=engine.precision.value,
        state=state.value,
        seconds=round(time.monotonic() - start, 2),
        max_abs=engine.error.max_abs,
        relative_l2=engine.error.relative_l2,
        bytes=sum((stage / name).stat().st_size for name in engine.files),
    )
    return key, engine, report


def _manifest(
    stage: Path,
    checkpoint: Checkpoint,
    options: BuildOptions,
    sizes: Sizes,
    prompting: PromptingSet,
    sampler: Sampler,
    engines: dict[str, Engine],
) -> Manifest:
    """What the bundle in `stage` says of itself, without an empty plan."""
    adapter, config = checkpoint.backbone, checkpoint.model_config
    canvas = checkpoint.config.canvas if checkpoint.config else None
    _, patch, _ = adapter.patch(config)
    return Manifest(
        name=checkpoint.path.resolve().name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint=Origin(name=checkpoint.path.resolve().name, sha256=checkpoint.sha256),
        backbone=adapter.name,
        tasks=checkpoint.config.tasks if checkpoint.config else adapter.tasks,
        conditioning=checkpoint.conditioning,
        stock=checkpoint.is_stock,
        engines=engines,
        files=describe_files(stage),
        latents=Latents(
            channels=adapter.latent_channels(config),
            scale=checkpoint.pixels_per_latent,
            patch=patch,
            frames=checkpoint.strides.time,
        ),
        frames=frames_of(checkpoint),
        sizes=sizes,
        max_batch=options.max_batch,
        guidance=_guidance(checkpoint),
        reference_sizes=checkpoint.reference_sizes,
        conditions={condition.name: condition.source for condition in adapter.conditions(config)},
        steps=Steps(default=min(checkpoint.defaults.steps, options.max_steps), max=options.max_steps),
        sampler=sampler,
        canvas=Canvas(grid=canvas.grid, pixels_per_token=canvas.pixels_per_token) if canvas else None,
        prompting=prompting,
        machine=machine_for(engine.precision for engine in engines.values()),
        versions={**library_versions(), "python": platform.python_version(), "mc-runtime": mc_runtime.__version__},
        quality={
            name: {"max_abs": engine.error.max_abs, "relative_l2": engine.error.relative_l2}
            for name, engine in engines.items()
            if engine.error
        },
    )


def _guidance(checkpoint: Checkpoint) -> Guidance:
    """How the model is guided: by weighing branches, by being told the scale, or (a distilled one) not at all."""
    adapter = checkpoint.backbone
    told = any(condition.source == "guidance_scale" for condition in adapter.conditions(checkpoint.model_config))
    branches = 1 if adapter.embeds_guidance else adapter.guidance_branches
    return Guidance(
        default=checkpoint.defaults.guidance_scale if told or branches > 1 else 1.0,
        branches=branches,
        embedded=told,
        ramp_from=adapter.guidance_ramp_from,
        zero_negative=checkpoint.zeroes_empty_negative,
        true_cfg=adapter.embeds_guidance and adapter.guidance_branches > 1,
    )


def _manifest_at(path: Path) -> Manifest | None:
    """The manifest of a whole bundle at `path`, or None."""
    try:
        bundle = open_bundle(path)
        bundle.verify()
    except BundleError:
        return None
    return bundle.manifest
