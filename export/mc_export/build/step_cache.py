"""How much may change before a residual is computed anew: measured with the bundle's own engines, on requests of its kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mc_export.build.cache import build_entry, content_key, lookup
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.quantize.calibration import calibration_prompts
from mc_export.quantize.media import calibration_media
from mc_runtime.bundle.decode import decode, encode
from mc_runtime.bundle.engines import STEP
from mc_runtime.bundle.manifest import Calibrated, Manifest, StepCache
from mc_runtime.bundle.store import write_manifest

THRESHOLDS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
_FILE = "step_cache.json"
# What calibration may cost, as bytes of the step engine x latent cells x steps x requests: a minute or two of two cores.
_WORK = 4e12
_MOST_REQUESTS = 8
# Thresholds beyond the first whose loss is this many times what it may be are not tried.
_HOPELESS = 2.0


def calibrated_cache(folder: Path, manifest: Manifest, checkpoint: Checkpoint, keys: Sequence[str], force: bool) -> StepCache:
    """The manifest's `step_cache` with thresholds measured, from the cache where the same engines were measured before.

    Args:
        folder: the bundle in the making, whole but for its manifest.
        manifest: what it will say, of engines that run here.
        checkpoint: what it is built from.
        keys: content keys of its engines and tokenizers.
        force: measure anew.
    """
    asked = manifest.step_cache
    assert asked is not None
    key = content_key({"step_cache": encode(asked), "keys": list(keys), "defaults": [manifest.steps, manifest.guidance]})

    def make(stage: Path) -> dict[str, Any]:
        write_manifest(folder, manifest)
        (stage / _FILE).write_text(json.dumps(encode(_measured(folder, manifest, asked, checkpoint))), encoding="utf-8")
        return {}

    entry = (None if force else lookup(key)) or build_entry(key, make)
    return decode(StepCache, json.loads((entry.directory / _FILE).read_text(encoding="utf-8")))


def _measured(folder: Path, manifest: Manifest, asked: StepCache, checkpoint: Checkpoint) -> StepCache:
    from mc_runtime.runtime.runtime import Runtime

    runtime = Runtime.load(folder, verify=False)
    requests = list(_requests(checkpoint, _affordable(folder, manifest)))
    whole = [runtime.generate(**request) for request in requests]
    table: list[Calibrated] = []
    for threshold in THRESHOLDS:
        kept = [runtime.generate(cache=threshold, **request) for request in requests]
        losses = [_loss(one.latents, other.latents) for one, other in zip(kept, whole, strict=True)]
        steps = sum(sum(one.computed_steps) for one in whole)
        table.append(
            Calibrated(
                threshold=threshold,
                loss=_rounded(float(np.mean(losses))),
                largest=_rounded(max(losses)),
                computed=round(sum(sum(one.computed_steps) for one in kept) / steps, 4),
            )
        )
        if table[-1].loss > _HOPELESS * asked.loss:
            break
    return chosen(asked, table, len(requests), manifest.steps.default)


def chosen(asked: StepCache, table: Sequence[Calibrated], requests: int, steps: int) -> StepCache:
    """With the largest threshold before the first whose loss is too large; 0, which keeps nothing, where all are."""
    threshold = 0.0
    for row in table:
        if row.loss > asked.loss:
            break
        threshold = row.threshold
    return StepCache(
        threshold=threshold, loss=asked.loss, calibrated=tuple(table), requests=requests, steps=steps, first=asked.first,
        last=asked.last, max_consecutive=asked.max_consecutive,
    )  # fmt: skip


def _requests(checkpoint: Checkpoint, count: int) -> Iterator[dict[str, Any]]:
    """Calibration prompts in turn, each as another of the checkpoint's tasks."""
    prompts = calibration_prompts(checkpoint)
    for index in range(count):
        given = calibration_media(checkpoint, checkpoint.defaults.frames, seed=index)
        one = given[index % len(given)]
        media: dict[str, Any] = {"image": one.pictures[0]} if one.pictures else {}
        media |= {"video": one.clip} if one.clip is not None else {}
        media |= {"frames": one.frames} if one.frames is not None else {}
        yield {"prompt": prompts[index % len(prompts)], "task": one.task, "seed": index, "output": "latents", **media}


def _affordable(folder: Path, manifest: Manifest) -> int:
    """How many requests: by the work they are, not by the clock, so that it is the same every time."""
    weights = sum((folder / file).stat().st_size for file in manifest.engines[STEP].files)
    side = manifest.latents.scale
    cells = (manifest.sizes.default[0] // side) * (manifest.sizes.default[1] // side)
    frames = 1 + (manifest.frames.default - 1) // manifest.latents.frames if manifest.frames else 1
    return int(min(_MOST_REQUESTS, max(1, _WORK // (weights * cells * frames * manifest.steps.default))))


def _loss(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
