"""What a bundle holds beside its engines: tokenizers, the sampler's table, the empty prompt's plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_export.build.cache import build_entry, content_key, copy_files, lookup
from mc_export.build.options import BuildOptions
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.prompting import planner_prompting, text_prompting
from mc_export.sampler import build_sampler_table, token_nodes
from mc_export.vision import planner_vision
from mc_runtime.bundle.arrays import save_arrays
from mc_runtime.bundle.manifest import Manifest, Prompting, PromptingSet, Sampler, Sizes
from mc_runtime.bundle.store import write_manifest
from mc_runtime.sampling.tables import SamplerTable

SAMPLER_FILE = "sampler.safetensors"
EMPTY_PLAN_FILE = "empty_plan.safetensors"


def write_prompting(checkpoint: Checkpoint, folder: Path) -> PromptingSet:
    """Writes the tokenizers of the engines that read text.

    Raises:
        CheckpointError: a tokenizer or a chat template cannot be used.
    """
    planner: Prompting | None = None
    encoders: tuple[Prompting, ...] = ()
    if checkpoint.config is not None:
        planner = planner_prompting(
            checkpoint.load_planner_tokenizer(), checkpoint.config, folder, vision=planner_vision(checkpoint)
        )
    if checkpoint.conditioning == "text_encoder":
        encoders = text_prompting(checkpoint.backbone, checkpoint.load_tokenizers(), folder)
    first, second = (*encoders, None, None)[:2]
    return PromptingSet(planner=planner, text_encoder=first, text_encoder_2=second)


def write_sampler(checkpoint: Checkpoint, sizes: Sizes, options: BuildOptions, folder: Path) -> Sampler:
    """Writes the table of the checkpoint's scheduler, from the cache where it was made before.

    Raises:
        UnsupportedSchedulerError: no table can stand for the scheduler; the message names it.
    """
    scheduler = checkpoint.load_scheduler()
    name = type(scheduler).__name__
    set_timesteps = checkpoint.backbone.set_timesteps(scheduler)
    scale = checkpoint.backbone.timestep_scale(checkpoint.model_config)
    arguments: dict[str, Any] = {"max_steps": options.max_steps, "timestep_scale": scale}
    if scheduler.config.get("use_dynamic_shifting"):
        arguments |= _served_tokens(checkpoint, scheduler, sizes, options.max_steps)
    key = content_key({"sampler": name, "backbone": checkpoint.backbone.name, "config": dict(scheduler.config), **arguments})

    def make(stage: Path) -> dict[str, Any]:
        table = build_sampler_table(scheduler, set_timesteps=set_timesteps, **arguments)
        table.save(stage / SAMPLER_FILE)
        return {}

    entry = None if options.force else lookup(key)
    copy_files(entry or build_entry(key, make), folder)
    table = SamplerTable.load(folder / SAMPLER_FILE)
    return Sampler(file=SAMPLER_FILE, scheduler=table.scheduler, order=table.order, dynamic_shift=table.is_dynamic)


def _served_tokens(checkpoint: Checkpoint, scheduler: Any, sizes: Sizes, max_steps: int) -> dict[str, Any]:
    """The latent tokens of the sizes to serve, where the schedule depends on them: those listed, or all within the limits.

    A schedule between which nothing can be interpolated serves the default size alone.
    """
    token = checkpoint.pixels_per_latent * checkpoint.backbone.patch(checkpoint.model_config)[1]

    def table_of(counts: Sequence[int]) -> SamplerTable:
        return build_sampler_table(
            scheduler, max_steps=max_steps, step_counts=(1, (max_steps + 1) // 2, max_steps), token_counts=counts,
            set_timesteps=checkpoint.backbone.set_timesteps(scheduler),
        )  # fmt: skip

    if sizes.served is None:
        nodes = token_nodes(table_of, (sizes.min // token) ** 2, (sizes.max // token) ** 2)
        if nodes is not None:
            return {"token_counts": nodes, "interpolates": True}
    served = sizes.served or (sizes.default,)
    return {"token_counts": sorted({(height // token) * (width // token) for height, width in served})}


def write_empty_plan(folder: Path, manifest: Manifest, keys: Sequence[str], force: bool) -> None:
    """Writes the empty negative prompt's plan at the default size, so that most requests plan their own prompt only.

    Args:
        folder: the bundle in the making, whole but for its manifest.
        manifest: what it will say, without an empty plan.
        keys: content keys of the engines and tokenizers the plan comes from.
        force: do not take it from the cache.
    """
    key = content_key({"empty_plan": list(keys), "size": manifest.sizes.default, "prompting": manifest.prompting})

    def make(stage: Path) -> dict[str, Any]:
        from mc_runtime.runtime.runtime import Runtime

        write_manifest(folder, manifest)
        branch = Runtime.load(folder, verify=False).plan("", "", manifest.sizes.default).branches[-1]
        arrays: dict[str, NDArray[Any]] = {"context": np.asarray(branch.context), "context_mask": branch.context_mask}
        optional = {"canvas": branch.canvas, "pooled": branch.pooled}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        save_arrays(stage / EMPTY_PLAN_FILE, arrays)
        return {}

    entry = None if force else lookup(key)
    copy_files(entry or build_entry(key, make), folder)
