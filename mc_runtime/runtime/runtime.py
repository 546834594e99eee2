"""The runtime: a bundle, opened, that plans, renders and generates."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from mc_runtime.backends.base import Settings
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.bundle.store import Bundle, open_bundle
from mc_runtime.errors import RequestError, shown
from mc_runtime.lora.shelf import LoraChoice, LoraShelf
from mc_runtime.runtime.engines import Engines
from mc_runtime.runtime.fallback import runnable
from mc_runtime.runtime.plan import Plan
from mc_runtime.runtime.rendering import Rendering, longest
from mc_runtime.runtime.request_planning import RequestPlanning
from mc_runtime.runtime.result import Result
from mc_runtime.runtime.reuse import CacheChoice, reuse_of
from mc_runtime.runtime.work import Cancel, OnStep, Work
from mc_runtime.tasks.registry import default_request, request_for

MAX_THREADS = 1024


class Runtime:
    """Serves one bundle. Engines are loaded when the first request needs them; several threads may share a runtime."""

    def __init__(self, bundle: Bundle, engines: Engines, fell_back: str | None = None) -> None:
        self.bundle = bundle
        self._engines = engines
        #: Why the bundle's own engines do not run here, where those of its fallback do instead; else None.
        self.fell_back = fell_back
        self._loras = LoraShelf(bundle.manifest)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str | None = None,
        verify: bool = True,
        cache_dir: str | Path | None = None,
        fallback: str | None = None,
    ) -> Self:
        """Open a bundle.

        Args:
            path: the bundle's directory.
            threads: CPU threads an engine may use; the library's choice by default.
            device: what the engines have to run on, `cpu` or `cuda`; by default what their targets run on (onnxruntime: `cpu`).
            verify: compare every file's sha256 with the manifest's; sizes are compared in any case.
            cache_dir: where engine libraries may keep what they compiled, so that the next start is faster.
            fallback: target of the engines to run where the bundle's own do not run on this machine; it holds such engines if
                it was built with `--fallback`. The attribute `fell_back` then says why.

        Raises:
            BundleError: the bundle is missing, damaged, of another version or made for another machine.
            EngineError: the library that one of its engines needs is not installed, or this machine has no GPU for it.
            RequestError: threads, device, cache_dir or fallback make no sense.
        """
        if threads is not None and (
            not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MAX_THREADS
        ):
            raise RequestError(f"threads must be a whole number from 1 to {MAX_THREADS}, got {shown(threads)}")
        if cache_dir is not None and not isinstance(cache_dir, (str, Path)):
            raise RequestError(f"cache_dir must be a path, got {shown(cache_dir)}")
        bundle = open_bundle(path)
        settings = Settings(threads, device, Path(cache_dir) if cache_dir else None)
        with ThreadPoolExecutor(1) as pool:
            verified = pool.submit(bundle.verify, hashes=verify)
            found = runnable(bundle, settings, fallback)  # meanwhile: importing is Python's work, hashing is not
            verified.result()
        return cls(found.bundle, found.engines, found.why)

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def warm_up(self) -> None:
        """Load every engine that a request needs now, ready for the default size where a prompt is all it takes."""
        required = self.manifest.required_components()
        self._engines.start(dict.fromkeys(required))  # side by side
        for component in required:
            self._engines.get(component)
        request = default_request(self.manifest, prompt="")
        if request is None:
            return
        shapes = self._rendering.shapes(request, self._planning.rows(request, self._planning.encode(request)))
        for component, known in shapes.items():
            self._engines.get(component).engine.prepare(known)

    def load_lora(self, path: str | Path, name: str | None = None) -> str:
        """Read a LoRA for requests to name; nothing is rebuilt. One of that name is replaced.

        Args:
            path: what diffusers' `save_lora_weights` wrote, or PEFT's folder for the planner; see `mc_runtime.lora`.
            name: how requests call it; the file's own name by default.

        Returns:
            Its name.

        Raises:
            RequestError: it cannot be read, or does not fit this bundle.
        """
        return self._loras.load(path, name)

    def unload_lora(self, name: str) -> None:
        """Forget a LoRA. Raises RequestError where none of that name is loaded."""
        self._loras.unload(name)

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of the LoRAs that are loaded."""
        return self._loras.names

    def forget_plans(self) -> None:
        """Empty the caches of plans and of encoded pictures, so that the next request makes them anew: for benchmarks."""
        self._planning.forget()
        self._rendering.forget()

    def plan(
        self,
        prompt: str,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
        *,
        task: str | None = None,
        lora: LoraChoice = (),
        **media: Any,
    ) -> Plan:
        """Read a prompt and draw its layout, for a picture of `size` (height, width) or the bundle's default.

        Args:
            prompt, negative_prompt: one text each.
            size: in pixels.
            task: one of the bundle's; guessed from what is given.
            lora: adapters, as in `generate`; renders of the plan have them too.
            media: what the task takes: `image`, `video`, `frames`, `fps` and so on, as in `generate`.

        Raises:
            RequestError: a prompt, a size or an input cannot be served.
        """
        if not isinstance(prompt, str) or not isinstance(negative_prompt, str):
            raise RequestError("plan takes one prompt and one negative prompt as strings; call it once a prompt")
        # A plan serves renders with and without guidance.
        guidance = 2.0 if self.manifest.guidance.branches > 1 else None
        true_scale = 2.0 if self.manifest.guidance.true_cfg else None
        request = request_for(
            self.manifest, task, prompt=prompt, negative_prompt=negative_prompt, size=size, guidance_scale=guidance,
            true_cfg_scale=true_scale, **media,
        )  # fmt: skip
        encoded = self._planning.encode(request, self._loras.active(lora))
        self._engines.start(dict.fromkeys(self._planning.components(encoded)))
        return self._planning.plans(request, encoded, Work(), media)[0]

    def render(
        self,
        plan: Plan,
        *,
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        latents: NDArray[Any] | None = None,
        output: str = "images",
        cache: CacheChoice = False,
        on_step: OnStep | None = None,
        cancel: Cancel | None = None,
    ) -> Result:
        """Make pictures of a plan; the arguments are `generate`'s. Raises RequestError, EngineError or Cancelled."""
        if not isinstance(plan, Plan):
            raise RequestError(f"render takes what plan returned, got {shown(plan)}")
        if plan.bundle != self.bundle.digest:
            raise RequestError("this plan was made by another bundle; plan the prompt again with this runtime")
        request = request_for(
            self.manifest,
            plan.task,
            prompt=plan.prompt,
            negative_prompt=plan.negative_prompt,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            size=plan.size,
            seed=seed,
            latents=latents,
            output=output,
            **plan.inputs,
        )
        work = Work(on_step, cancel)
        reuse = reuse_of(self.manifest, cache, plan.lora)
        self._engines.start(
            dict.fromkeys(self._rendering.components)
            | self._rendering.shapes(request, longest([plan], request), lora=plan.lora, reuse=reuse)
        )
        return self._rendering.render(request, (plan,), work, reuse)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        task: str | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        latents: NDArray[Any] | None = None,
        output: str = "images",
        lora: LoraChoice = (),
        cache: CacheChoice = False,
        on_step: OnStep | None = None,
        cancel: Cancel | None = None,
        **media: Any,
    ) -> Result:
        """Make pictures, or videos, of one prompt or several.

        Args:
            prompt: a text, or a list of them.
            task: one of `manifest.tasks`; guessed from what is given.
            negative_prompt: what guidance leads away from; one for all, or one a prompt.
            num_images: pictures, or videos, a prompt.
            steps, guidance_scale, size: the bundle's defaults where None; size is (height, width) in pixels.
                Guidance is off at 1 and below.
            true_cfg_scale: of the negative prompt, where the model takes the guidance scale itself (FLUX) and the negative
                prompt has a scale of its own; off at 1, the default.
            seed: of the first image; the next ones count up. A list names one an image. An image depends on its own
                seed only, not on what it is made together with.
            latents: unit noise f32 `[images, C, (T,) H, W]` in place of the seeds'.
            output: `images`, or `latents` for the denoised latents alone.
            lora: names of adapters that `load_lora` read, or a mapping of names to scales; their changes add up.
            cache: True, or a threshold, to keep the backbone's residual between steps that change little, at a small loss; the
                bundle must be built with `--cache`. See docs/cache.md.
            on_step: called with a `Step` after every denoising step.
            cancel: an event or a function; asked before every step.
            media: what the task takes (`mc_runtime.tasks`): `image` (a path, a Pillow image, an array, or a list of them),
                `video` (a path, a folder of frames, an array), `frames`, `fps`, `motion_bucket`, `noise_augmentation`.

        Raises:
            RequestError: something cannot be served; the message says what can.
            EngineError: an engine failed, or its numbers are not finite.
            Cancelled: `cancel` said so.
        """
        work = Work(on_step, cancel)
        with work.stopwatch.stage("plan"):
            request = request_for(
                self.manifest,
                task,
                prompt=prompt,
                negative_prompt=negative_prompt,
                num_images=num_images,
                steps=steps,
                guidance_scale=guidance_scale,
                true_cfg_scale=true_cfg_scale,
                size=size,
                seed=seed,
                latents=latents,
                output=output,
                **media,
            )
            active = self._loras.active(lora)
            reuse = reuse_of(self.manifest, cache, active)
            encoded = self._planning.encode(request, active)
            shapes = self._rendering.shapes(request, self._planning.rows(request, encoded), lora=active, reuse=reuse)
        self._engines.start(dict.fromkeys((*self._planning.components(encoded), *self._rendering.components)) | shapes)
        return self._rendering.render(request, self._planning.plans(request, encoded, work, media), work, reuse)

    @cached_property
    def _planning(self) -> RequestPlanning:
        return RequestPlanning(self.bundle, self._engines)

    @cached_property
    def _rendering(self) -> Rendering:
        return Rendering(self.bundle, self._engines)
