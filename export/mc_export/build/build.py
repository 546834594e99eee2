"""From a checkpoint to a bundle."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mc_runtime
from mc_export.build.cache import library_versions, sweep_cache
from mc_export.build.contents import EMPTY_PLAN_FILE, write_empty_plan, write_prompting, write_sampler
from mc_export.build.limits import refuse_limited, refuse_uncut
from mc_export.build.options import BuildOptions
from mc_export.build.parts import Part, facts_of, frames_of, limits_of, parts_of, sizes_of
from mc_export.build.placing import ENGINES, FALLBACK, Placing, fallback_name
from mc_export.build.progress import BUNDLE, ProgressCallback, ProgressLog, State
from mc_export.build.reports import BuildReport, EngineReport
from mc_export.build.step_cache import calibrated_cache
from mc_export.build.verify import runs_here
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint
from mc_export.lower.tensorrt import builds_plans
from mc_runtime.backends.registry import runs_on_gpu
from mc_runtime.bundle.atomic import staged_directory
from mc_runtime.bundle.machine import machine_for
from mc_runtime.bundle.manifest import (
    MANIFEST_FILE,
    Canvas,
    Engine,
    Fallback,
    Guidance,
    Latents,
    Machine,
    Manifest,
    PromptingSet,
    Sampler,
    Sizes,
    StepCache,
    Steps,
)
from mc_runtime.bundle.manifest import Checkpoint as Origin
from mc_runtime.bundle.store import describe_files, open_bundle, write_manifest
from mc_runtime.errors import BundleError
from mc_runtime.tasks.registry import default_request


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
    refuse_uncut(checkpoint.backbone, options)
    sizes = sizes_of(checkpoint, options)
    prompting = write_prompting(checkpoint, stage)
    sampler = write_sampler(checkpoint, sizes, options, stage)
    limits = limits_of(checkpoint, sizes, prompting, options, sampler.order)
    parts = parts_of(checkpoint, limits, options)
    refuse_limited(checkpoint.backbone, [part.component for part in parts], options)
    placing = Placing(stage, checkpoint, options, sizes, ProgressLog(progress, _announced(parts, options)))
    for part in parts:
        for choice in (options.choice(part.component), *((options.fallback,) if options.fallback else ())):
            placing.check(part.component, choice)
    hashes: dict[str, str] = {}
    engines: dict[str, Engine] = {}
    spare: dict[str, Engine] = {}
    for part in parts:
        facts = facts_of(part, checkpoint, limits, hashes)
        choice = options.choice(part.component)
        engines[part.component] = placing.place(part, facts, choice, ENGINES)
        if options.fallback == choice:
            spare[part.component] = engines[part.component]
        elif options.fallback is not None:
            spare[part.component] = placing.place(part, facts, options.fallback, FALLBACK)
    placing.log.enter(BUNDLE, State.WRITING)
    manifest = _manifest(stage, checkpoint, options, sizes, prompting, sampler, engines, spare)
    run_by = _run_by(stage, manifest)
    if run_by is None:
        return manifest, tuple(placing.reports)
    keys = [*placing.keys, *(file.sha256 for file in manifest.files.values())]
    if default_request(manifest, prompt="") is not None:
        write_empty_plan(stage, run_by, keys, options.force)
        planned: dict[str, Any] = {"empty_plan": EMPTY_PLAN_FILE, "files": describe_files(stage)}
        manifest, run_by = replace(manifest, **planned), replace(run_by, **planned)
    if options.step_cache:
        placing.log.enter(BUNDLE, State.CALIBRATING)
        manifest = replace(manifest, step_cache=calibrated_cache(stage, run_by, checkpoint, keys, options.force))
    return manifest, tuple(placing.reports)


def _announced(parts: Sequence[Part], options: BuildOptions) -> list[tuple[str, bool, bool]]:
    """What the progress counts: every engine with what its build goes through, those of the fallback too."""
    choices = [(part.component, options.choice(part.component)) for part in parts]
    if options.fallback is not None:
        choices += [(fallback_name(component), options.fallback) for component, choice in choices if choice != options.fallback]
    return [(name, choice.is_quantized, builds_plans(choice.target)) for name, choice in choices]


def _run_by(stage: Path, manifest: Manifest) -> Manifest | None:
    """The manifest whose engines run here, to plan the empty prompt and to calibrate: the bundle's own, or its fallback's.

    None where neither run here: the first request plans the empty prompt then, and no threshold is calibrated.
    """
    specs = ((component, manifest.engines[component]) for component in manifest.required_components())
    plans = [(component, spec) for component, spec in specs if builds_plans(spec.target)]
    if all(runs_here(component, spec, [stage / name for name in spec.files]) for component, spec in plans):
        return manifest
    return manifest.on_fallback() if manifest.fallback else None


def _manifest(
    stage: Path,
    checkpoint: Checkpoint,
    options: BuildOptions,
    sizes: Sizes,
    prompting: PromptingSet,
    sampler: Sampler,
    engines: dict[str, Engine],
    spare: dict[str, Engine],
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
        fallback=Fallback(engines=spare, machine=_machine_of(spare)) if spare else None,
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
        step_cache=StepCache(loss=options.cache_loss) if options.step_cache else None,
        prompting=prompting,
        machine=_machine_of(engines),
        versions={**library_versions(), "python": platform.python_version(), "mc-runtime": mc_runtime.__version__},
        quality={
            name: {"max_abs": engine.error.max_abs, "relative_l2": engine.error.relative_l2}
            for name, engine in engines.items()
            if engine.error
        },
    )


def _machine_of(engines: Mapping[str, Engine]) -> Machine:
    """What engines need of a machine; what its CPU can do is of no matter to those on a GPU."""
    return machine_for(engine.precision for engine in engines.values() if not runs_on_gpu(engine.target))


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
