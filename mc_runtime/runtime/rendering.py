"""From plans to pictures: noise, the denoising loop, the decoder; batch after batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Shapes
from mc_runtime.bundle.engines import STEP, STEP_FIRST, STEP_REST
from mc_runtime.bundle.store import Bundle
from mc_runtime.errors import BundleError
from mc_runtime.lora import PLAIN, ActiveLora
from mc_runtime.runtime.batch import step_batch, step_shapes
from mc_runtime.runtime.conditions import Conditions
from mc_runtime.runtime.cut_state import Cut, rest_shapes
from mc_runtime.runtime.decoding import Decoding
from mc_runtime.runtime.denoise import denoise
from mc_runtime.runtime.engines import Engines
from mc_runtime.runtime.plan import Plan
from mc_runtime.runtime.result import Result
from mc_runtime.runtime.reuse import Decisions, Reuse
from mc_runtime.runtime.work import Work
from mc_runtime.sampling.noise import initial_noise
from mc_runtime.sampling.tables import SamplerTable, Schedule
from mc_runtime.tasks.request import Request


class Rendering:
    """Renders the plans of one bundle."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._engines = engines
        self._conditions = Conditions(bundle.manifest, engines)
        self._decoding = Decoding(bundle.manifest, engines)

    def render(self, request: Request, plans: tuple[Plan, ...], work: Work, reuse: Reuse | None = None) -> Result:
        """All pictures, or videos, of a request; `plans` has one a prompt, all made with the same adapters."""
        owners = [plan for plan in plans for _ in range(request.num_images)]
        schedule, lora = self._schedule(request), plans[0].lora
        size = self._manifest.max_batch
        batches = [range(start, min(start + size, len(owners))) for start in range(0, len(owners), size)]
        work.expect(len(batches) * len(schedule))
        latents, pictures, computed = [], [], []
        for batch in batches:
            of_batch = [owners[index] for index in batch]
            shapes = self.shapes(request, longest(of_batch, request), len(batch), lora=lora, reuse=reuse)
            self._engines.wait_for(self._conditions.components, work)
            self._engines.wait_for(map(lora.engine, _steps(reuse)), work, shapes)
            made, whole = self._denoised(request, of_batch, batch, schedule, work, reuse)
            latents.append(made)
            computed += whole
            if request.output == "images":
                self._engines.wait_for(self._decoding.components, work, shapes)
                pictures += self._decoding.decode(made, request, work)
        images, clips = self._decoding.sorted(pictures)
        return Result(images, np.concatenate(latents), request.seeds, work.timings(), plans, clips, tuple(computed))

    def shapes(
        self,
        request: Request,
        longest: int,
        images: int | None = None,
        *,
        lora: ActiveLora = PLAIN,
        reuse: Reuse | None = None,
    ) -> dict[str, Shapes]:
        """The engines that follow the plan, with the shapes of a batch of images (the first one, if not said)."""
        canvas = self._manifest.canvas
        engine, *rest = (lora.engine(part) for part in _steps(reuse))
        spec = self._manifest.engines[engine]
        step = step_shapes(
            spec,
            images=images or min(self._manifest.max_batch, len(request.seeds)),
            branches=len(request.branch_weights),
            longest=longest,
            latent=request.latent_shape,
            grid=canvas.grid_for(request.size) if canvas else None,
            conditions=self._conditions.shapes(request),
        )
        found = {engine: step} | {part: rest_shapes(spec, self._manifest.engines[part], step) for part in rest}
        return found | (self._decoding.shapes(request) if request.output == "images" else {})

    def forget(self) -> None:
        """Empty the cache of encoded pictures and clips."""
        self._conditions.forget()

    @property
    def components(self) -> tuple[str, ...]:
        """The engines that its conditions need, before the step."""
        return self._conditions.components

    def _denoised(
        self, request: Request, plans: Sequence[Plan], batch: range, schedule: Schedule, work: Work, reuse: Reuse | None
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Latents of a batch, and how many steps each of its results computed whole."""
        lora = plans[0].lora
        step, *rest = (self._engines.get(lora.engine(part)) for part in _steps(reuse))
        weights = request.branch_weights
        branches = [plan.branches[: len(weights)] for plan in plans]
        conditions = {}
        if self._manifest.conditions:
            with work.stopwatch.stage("encode"):
                conditions = self._conditions.of_batch(request, branches, request.seeds[batch.start : batch.stop], work)
        with work.stopwatch.stage("denoise"):
            noise = _noise(request, batch) * np.float32(schedule.init_noise_sigma)
            inputs = step_batch(step.spec, noise, branches, weights, conditions)
            if reuse is None:
                inputs = replace(inputs, constant={**inputs.constant, **lora.of(STEP)})
                return denoise(step, inputs, schedule, work.clock, work), [len(schedule)] * len(batch)
            decisions = Decisions(reuse, len(schedule), len(inputs.sample))
            cut = Cut(rest[0], decisions, lora.of(STEP_REST))
            inputs = replace(inputs, constant={**inputs.constant, **lora.of(STEP_FIRST)})
            made = denoise(step, inputs, schedule, work.clock, work, cut)
            return made, decisions.computed[: len(batch)].tolist()

    def _schedule(self, request: Request) -> Schedule:
        patch = self._manifest.latents.patch
        *_, height, width = request.latent_shape
        return self._table.schedule(request.steps, tokens=(height // patch) * (width // patch))

    @cached_property
    def _table(self) -> SamplerTable:
        path, listed = self._bundle.file(self._manifest.sampler.file), self._manifest.sampler
        table = SamplerTable.load(path)
        found = (table.order, table.max_steps, table.is_dynamic)
        if found != (listed.order, self._manifest.steps.max, listed.dynamic_shift):
            raise BundleError(
                f"{path}: another sampler than the manifest's (order, steps, dynamic shift: {found}); "
                "build the bundle again with `mc-runtime build`"
            )
        return table


def _steps(reuse: Reuse | None) -> tuple[str, ...]:
    """The engines that a step runs."""
    return (STEP,) if reuse is None else (STEP_FIRST, STEP_REST)


def longest(plans: Sequence[Plan], request: Request) -> int:
    """Context rows of the longest branch that this request uses."""
    count = len(request.branch_weights)
    return max(len(branch.context) for plan in plans for branch in plan.branches[:count])


def _noise(request: Request, batch: range) -> NDArray[np.float32]:
    """Unit noise of a batch, `[B, C, (T,) H, W]`: the caller's, or every result's own."""
    if request.latents is not None:
        return request.latents[batch.start : batch.stop]
    return np.stack([initial_noise(request.seeds[index], request.latent_shape) for index in batch])
