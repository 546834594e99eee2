"""The runtime: a bundle, opened, that plans, renders and generates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Settings, Shapes
from mc_runtime.bundle.machine import check_machine
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.bundle.store import Bundle, open_bundle
from mc_runtime.errors import BundleError, RequestError, shown
from mc_runtime.runtime.batch import step_batch, step_shapes
from mc_runtime.runtime.denoise import denoise
from mc_runtime.runtime.engines import Engines, fixed
from mc_runtime.runtime.plan import Plan
from mc_runtime.runtime.planning import EncodedPrompt, Planning
from mc_runtime.runtime.result import Result
from mc_runtime.runtime.work import Cancel, OnStep, Work
from mc_runtime.sampling.noise import initial_noise
from mc_runtime.sampling.tables import SamplerTable, Schedule
from mc_runtime.tasks.text_to_image import TextToImage, latent_shape

if TYPE_CHECKING:
    from PIL import Image

MAX_THREADS = 1024


class Runtime:
    """Serves one bundle. Engines are loaded when the first request needs them; several threads may share a runtime."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.bundle = bundle
        self._engines = Engines(bundle, settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        verify: bool = True,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            threads: CPU threads an engine may use; the library's choice by default.
            device: what the engines run on.
            verify: compare every file's sha256 with the manifest's; sizes are compared in any case.
            cache_dir: where engine libraries may keep what they compiled, so that the next start is faster.

        Raises:
            BundleError: the bundle is missing, damaged, of another version or made for another machine.
            EngineError: the library that one of its engines needs is not installed.
            RequestError: threads, device or cache_dir make no sense.
        """
        if threads is not None and (
            not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
        ):
            raise RequestError(f"threads must be a whole number from 1 to {MAX_THREADS}, got {shown(threads)}")
        if cache_dir is not None and not isinstance(cache_dir, (str, Path)):
            raise RequestError(f"cache_dir must be a path, got {shown(cache_dir)}")
        bundle = open_bundle(path)
        check_machine(bundle.manifest.machine, bundle.path)
        runtime = cls(bundle, Settings(threads, device, Path(cache_dir) if cache_dir else None))
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(bundle.verify, hashes=verify)
            runtime._engines.import_backends()  # meanwhile: importing is Python's work, hashing is not
            verified.result()
        return runtime

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def warm_up(self) -> None:
        """Load every engine that a picture needs now, ready for the default size, and not with the first request."""
        request = TextToImage.from_arguments(self.manifest, prompt="")
        shapes = self._engine_shapes(request, self._rows(request, self._encode(request)))
        for component in self.manifest.required_components():
            self._engines.get(component)
        for component, known in shapes.items():
            self._engines.get(component).engine.prepare(known)

    def forget_plans(self) -> None:
        """Empty the cache of plans, so that the next request is planned anew; a benchmark wants that."""
        self._planning.forget()

    def plan(self, prompt: str, negative_prompt: str = "", size: tuple[int, int] | None = None) -> Plan:
        """Read a prompt and draw its layout, for a picture of `size` (height, width) or the bundle's default.

        Raises RequestError for a prompt or a size that cannot be served.
        """
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str):
            raise RequestError("plan takes one prompt and one negative prompt as strings; call it once a prompt")
        guidance = 2.0 if self.manifest.guidance.branches > 1 else 1.0  # a plan serves renders with and without
        request = TextToImage.from_arguments(
            self.manifest, prompt=prompt, negative_prompt=negative_prompt, size=size, guidance_scale=guidance
        )
        encoded = self._encode(request)
        self._engines.start(dict.fromkeys(self._planning.components))
        return self._plans(request, encoded, Work())[0]

    def render(
        self,
        plan: Plan,
        *,
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        latents: NDArray[Any] | None = None,
        output: str = "images",
        on_step: OnStep | None = None,
        cancel: Cancel | None = None,
    ) -> Result:
        """Make pictures of a plan; the arguments are `generate`'s. Raises RequestError, EngineError or Cancelled."""
        if not isinstance(plan, Plan):
            raise RequestError(f"render takes what plan returned, got {shown(plan)}")
        if plan.bundle != self.bundle.digest:
            raise RequestError("this plan was made by another bundle; plan the prompt again with this runtime")
        request = TextToImage.from_arguments(
            self.manifest,
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            size=plan.size,
            seed=seed,
            latents=latents,
            output=output,
        )
        work = Work(on_step, cancel)
        self._engines.start(self._engine_shapes(request, _longest([plan], request)))
        return self._render(request, (plan,), work)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        latents: NDArray[Any] | None = None,
        output: str = "images",
        on_step: OnStep | None = None,
        cancel: Cancel | None = None,
    ) -> Result:
        """Make pictures of one prompt or several.

        Args:
            prompt: a text, or a list of them.
            negative_prompt: what guidance leads away from; one for all, or one a prompt.
            num_images: pictures a prompt.
            steps, guidance_scale, size: the bundle's defaults where None; size is (height, width) in pixels.
                Guidance is off at 1 and below.
            seed: of the first image; the next ones count up. A list names one an image. An image depends on its own
                seed only, not on what it is made together with.
            latents: unit noise f32 `[images, C, H, W]` in place of the seeds'.
            output: `images`, or `latents` for the denoised latents alone.
            on_step: called with a `Step` after every denoising step.
            cancel: an event or a function; asked before every step.

        Raises:
            RequestError: something cannot be served; the message says what can.
            EngineError: an engine failed, or its numbers are not finite.
            Cancelled: `cancel` said so.
        """
        request = TextToImage.from_arguments(
            self.manifest,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            size=size,
            seed=seed,
            latents=latents,
            output=output,
        )
        work = Work(on_step, cancel)
        with work.stopwatch.stage("plan"):
            encoded = self._encode(request)
            shapes = self._engine_shapes(request, self._rows(request, encoded))
        self._engines.start(dict.fromkeys(self._planning.components) | shapes)
        return self._render(request, self._plans(request, encoded, work), work)

    def _encode(self, request: TextToImage) -> list[list[EncodedPrompt]]:
        """Token ids of every prompt, and of its negative prompt where guidance uses it."""
        encode = self._planning.encode
        pairs = zip(request.prompts, request.negative_prompts, strict=True)
        if not request.uses_guidance:
            return [[encode(prompt)] for prompt, _ in pairs]
        return [[encode(prompt), encode(negative, negative=True)] for prompt, negative in pairs]

    def _plans(self, request: TextToImage, encoded: list[list[EncodedPrompt]], work: Work) -> tuple[Plan, ...]:
        """One plan a prompt."""
        self._wait_for(self._planning.components, work)
        plans = []
        for prompt, negative, texts in zip(request.prompts, request.negative_prompts, encoded, strict=True):
            work.stop_if_cancelled()
            with work.stopwatch.stage("plan"):
                branches = tuple(self._planning.branch(text, request.size, work.clock) for text in texts)
            plans.append(Plan(prompt, negative, request.size, branches, self.bundle.digest))
        return tuple(plans)

    def _render(self, request: TextToImage, plans: tuple[Plan, ...], work: Work) -> Result:
        """Batch after batch: noise, the denoising loop, the decoder, pictures."""
        owners = [plan for plan in plans for _ in range(request.num_images)]
        latent = latent_shape(self.manifest, request.size)
        schedule = self._schedule(request, latent)
        size = self.manifest.max_batch
        batches = [range(start, min(start + size, len(owners))) for start in range(0, len(owners), size)]
        work.expect(len(batches) * len(schedule))
        latents, images = [], []
        for batch in batches:
            of_batch = [owners[index] for index in batch]
            shapes = self._engine_shapes(request, _longest(of_batch, request), len(batch))
            self._wait_for(["step"], work, shapes)
            with work.stopwatch.stage("denoise"):
                noise = self._noise(request, batch, latent)
                made = self._denoise(request, of_batch, noise, schedule, work)
            latents.append(made)
            if request.output == "images":
                self._wait_for(["vae_decoder"], work, shapes)
                images += self._decode(made, work)
        return Result(images, np.concatenate(latents), request.seeds, work.timings(), plans)

    def _noise(self, request: TextToImage, batch: range, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Unit noise of a batch, `[B, C, H, W]`: the caller's, or every image's own."""
        if request.latents is not None:
            return request.latents[batch.start : batch.stop]
        return np.stack([initial_noise(request.seeds[index], shape) for index in batch])

    def _denoise(
        self, request: TextToImage, plans: Sequence[Plan], noise: NDArray[np.float32], schedule: Schedule, work: Work
    ) -> NDArray[np.float32]:
        step = self._engines.get("step")
        weights = request.branch_weights
        branches = [plan.branches[: len(weights)] for plan in plans]
        batch = step_batch(step.spec, noise * np.float32(schedule.init_noise_sigma), branches, weights)
        return denoise(step, batch, schedule, work.clock, work)

    def _decode(self, latents: NDArray[np.float32], work: Work) -> list[Image.Image]:
        """Pictures of a batch, one at a time: the decoder's memory at full resolution is a multiple of the loop's."""
        from mc_runtime.media.images import pixels_to_images

        decoder = self._engines.get("vae_decoder")
        images = []
        for one in latents:
            work.stop_if_cancelled()
            with work.stopwatch.stage("decode"):
                inputs = np.repeat(one[None], fixed(decoder.spec, "latents", 0) or 1, axis=0)
                pixels = decoder.run({"latents": inputs}, work.clock)["pixels"][:1]
            with work.stopwatch.stage("pixels"):
                images += pixels_to_images(pixels)
        return images

    def _schedule(self, request: TextToImage, shape: tuple[int, int, int]) -> Schedule:
        patch = self.manifest.latents.patch
        return self._table.schedule(request.steps, tokens=(shape[1] // patch) * (shape[2] // patch))

    def _rows(self, request: TextToImage, encoded: list[list[EncodedPrompt]]) -> int:
        """Context rows of the longest branch in the first batch."""
        prompts = -(-self.manifest.max_batch // request.num_images)
        return max(self._planning.rows(text, request.size) for texts in encoded[:prompts] for text in texts)

    def _engine_shapes(self, request: TextToImage, longest: int, images: int | None = None) -> dict[str, Shapes]:
        """The engines that follow the plan, with the shapes of a batch of images (the first one, if not said)."""
        latent = latent_shape(self.manifest, request.size)
        step = step_shapes(
            self.manifest.engines["step"],
            images=images or min(self.manifest.max_batch, len(request.seeds)),
            branches=len(request.branch_weights),
            longest=longest,
            latent=latent,
            grid=self._planning.grid(request.size),
        )
        if request.output == "latents":
            return {"step": step}
        count = fixed(self.manifest.engines["vae_decoder"], "latents", 0) or 1
        return {"step": step, "vae_decoder": {"latents": (count, *latent)}}

    def _wait_for(self, components: Iterable[str], work: Work, shapes: Mapping[str, Shapes] | None = None) -> None:
        """Count what is left of loading these engines as loading, not as the stage that needs them."""
        with work.stopwatch.stage("load"):
            for component in components:
                loaded = self._engines.get(component)
                if shapes:
                    loaded.engine.prepare(shapes[component])

    @cached_property
    def _planning(self) -> Planning:
        return Planning(self.bundle, self._engines)

    @cached_property
    def _table(self) -> SamplerTable:
        path, listed = self.bundle.file(self.manifest.sampler.file), self.manifest.sampler
        table = SamplerTable.load(path)
        found = (table.order, table.max_steps, table.is_dynamic)
        if found != (listed.order, self.manifest.steps.max, listed.dynamic_shift):
            raise BundleError(
                f"{path}: another sampler than the manifest's (order, steps, dynamic shift: {found}); "
                "build the bundle again with `mc-runtime build`"
            )
        return table


def _longest(plans: Sequence[Plan], request: TextToImage) -> int:
    """Context rows of the longest branch that this request uses."""
    count = len(request.branch_weights)
    return max(len(branch.context) for plan in plans for branch in plan.branches[:count])
