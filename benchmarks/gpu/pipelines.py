"""One request by each way: the reference pipeline in torch, and our programs in the runtime's own loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu import weights
from benchmarks.gpu.device import Device
from benchmarks.gpu.subjects import Subject
from mc_export.autoencoders.registry import AUTOENCODERS
from mc_export.model.injection import CanvasBackbone
from mc_export.model.planner import Planner
from mc_export.reference.pipeline import Conditions, ReferencePipeline
from mc_runtime.runtime.batch import StepBatch, step_batch
from mc_runtime.runtime.denoise import denoise
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.plan import Branch
from mc_runtime.runtime.work import EngineClock
from mc_runtime.sampling.noise import initial_noise
from mc_runtime.sampling.tables import Schedule


class Request:
    """The numbers of a subject's request, the same for every way."""

    def __init__(self, subject: Subject, config: Any) -> None:
        self.subject = subject
        self.noise = initial_noise(0, subject.latent)[None]
        random = np.random.default_rng(1)
        axes = dict(zip(("C", *subject.adapter.latent_axes), subject.latent, strict=True)) | dict(subject.extents)
        self.conditions: dict[str, np.ndarray] = {}
        for condition in subject.adapter.conditions(config):
            shape = [axes[size] if isinstance(size, str) else size for size in condition.shape]
            shape = [1, *([subject.branches] if condition.per_branch else []), *shape]
            value = subject.told.get(condition.name, 0.0)
            array = random.standard_normal(shape) if value == "random" else np.full(shape, value)
            self.conditions[condition.name] = array.astype(np.float32)

    def prompt(self, seed: int) -> dict[str, Tensor]:
        """Ids, mask and positions of an instruction and its canvas, as the planner takes them; batch 1."""
        subject = self.subject
        assert subject.planner is not None
        ids = torch.from_numpy(np.random.default_rng(seed).integers(8, subject.planner.vocabulary, (1, subject.rows)))
        positions = torch.arange(subject.rows).expand(3, 1, -1).contiguous()
        grid = torch.stack(torch.meshgrid(*(torch.arange(extent) for extent in subject.grid), indexing="ij"))
        mask = torch.ones(1, subject.rows, dtype=torch.int64)
        canvas = grid[:, None] + subject.rows
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "canvas_position_ids": canvas}


class Stopwatch:
    """Seconds by stage, the device idle at either end of each."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds to `name`."""
        start = time.perf_counter()
        yield
        self._device.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Reference(ReferencePipeline):
    """The reference pipeline of random models that lie on the device; without a planner its context is random.

    Args:
        subject: what to make.
        device: where.
        source: another reference whose weights it shares; without one they are drawn.
    """

    def __init__(self, subject: Subject, device: Device, source: Reference | None = None) -> None:
        self.subject, self.device, self.dtype = subject, device, torch.bfloat16
        adapter = subject.published or subject.adapter

        def made(name: str, make: Callable[[], nn.Module], seed: int) -> Any:
            if source is None:
                return weights.drawn(make, device.torch, seed)
            return weights.twin(make, getattr(source, name), device.torch)

        self.model = made("model", subject.model, 1)
        self.canvas = made("canvas", lambda: weights.canvas_model(subject, self.model.config), 2)
        self.backbone = CanvasBackbone(adapter, self.model, self.canvas.canvas_connector).eval()
        size, autoencoder = subject.planner, subject.autoencoder
        self.qwen = None if size is None else made("qwen", lambda: weights.planner_model(size), 3)
        self.planner = None if size is None else Planner(self.qwen, self.canvas.canvas_tokens).eval()
        self.vae = None if autoencoder is None else made("vae", autoencoder, 4)
        kind = AUTOENCODERS.get(type(self.vae).__name__)
        self.checkpoint: Any = SimpleNamespace(
            backbone=adapter, model_config=self.model.config, load_scheduler=subject.scheduler,
            autoencoder=SimpleNamespace(scaling=lambda config: kind.scaling(config).to(device.torch)) if kind else None,
            vae_config=self.vae.config if self.vae else None,
        )  # fmt: skip

    @property
    def modules(self) -> tuple[nn.Module | None, ...]:
        """All that holds weights."""
        return self.model, self.canvas, self.qwen, self.vae

    def branch(self, request: Request, seed: int) -> Conditions:
        """One branch planned, or random where there is no planner."""
        subject, device = self.subject, self.device.torch
        if self.planner is None:
            generator = torch.Generator(device).manual_seed(seed)
            draw = lambda *shape: torch.randn(shape, generator=generator, device=device).to(self.dtype)  # noqa: E731
            config = self.model.config
            context = draw(1, subject.rows, subject.adapter.context_width(config))
            mask = torch.ones(1, subject.rows, dtype=torch.int64, device=device)
            return Conditions(context, mask, draw(1, *subject.grid, subject.adapter.width(config)))
        prompt = {name: tensor.to(device) for name, tensor in request.prompt(seed).items()}
        states = self.planner(**prompt)
        mask, pooled = prompt["attention_mask"], None
        if self.canvas.pooled_connector is not None:
            pooled = self.canvas.pooled_connector.of_rows(states.context, mask)
        canvas = self.canvas.canvas_connector.draw(states.canvas)
        return Conditions(self.canvas.context_connector(states.context), mask, canvas, pooled)

    def draw(self, request: Request, watch: Stopwatch, steps: int) -> Tensor:
        """The request once, as diffusers' pipelines go: both prompts, the loop, the picture. Latents, float32, on the host."""
        with watch.stage("plan") if self.planner is not None else nullcontext():
            branches = self.branches(request)
        with watch.stage("denoise"):
            latents = self.loop(request, branches, steps)
        if self.vae is not None:
            with watch.stage("decode"):
                (self._decoded(latents) / 2 + 0.5).clamp(0, 1).cpu()
        return latents.float().cpu()

    def truth(self, request: Request, steps: int) -> Tensor:
        """The same latents by float32 arithmetic on the same weights, planner and backbone in turn, for the memory."""
        with self._in_float32(self.qwen, self.canvas):
            branches = self.branches(request)
        with self._in_float32(self.model, self.canvas):
            return self.loop(request, branches, steps).cpu()

    def branches(self, request: Request) -> list[Conditions]:
        """All branches."""
        return [self.branch(request, seed) for seed in range(self.subject.branches)]

    def loop(self, request: Request, branches: list[Conditions], steps: int) -> Tensor:
        """Noise to latents, on the device."""
        told = {name: torch.from_numpy(array).to(self.device.torch) for name, array in request.conditions.items()}
        told.pop("pooled", None)  # the branches have it
        noise = torch.from_numpy(request.noise).to(self.device.torch)
        return self.denoise(noise, branches, steps, self.subject.guidance, told)

    def _predict(self, sample: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        """Schedulers keep their timesteps on the host."""
        return super()._predict(sample, timestep.to(self.device.torch, non_blocking=True), *rest)

    @contextmanager
    def _in_float32(self, *modules: nn.Module | None) -> Iterator[None]:
        """Their weights as float32, the same numbers; what they share memory with keeps it."""
        kept = [(parameter, parameter.data) for module in filter(None, modules) for parameter in module.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = data.float()
            self.dtype = torch.float32
            yield
        finally:
            for parameter, data in kept:
                parameter.data = data
            self.dtype = torch.bfloat16


class _Nobody:
    """Looks on and says nothing."""

    def before_step(self) -> None:
        """Nothing to say."""

    def after_step(self, timestep: float, seconds: float, latents: Callable[[], Any]) -> None:
        """Nothing to say."""


class Ours:
    """Engines in the production half's own loop.

    Args:
        engines: `step`, and `planner` and `vae_decoder` where the subject has them.
        schedules: by the number of steps.

    Attributes:
        given: branches that are given instead of planned.
    """

    def __init__(
        self, subject: Subject, device: Device, engines: dict[str, LoadedEngine], schedules: Callable[[int], Schedule]
    ) -> None:
        self.subject, self.device, self.engines, self._schedules = subject, device, engines, schedules
        self.given: list[Branch] = []
        self._negative: Branch | None = None

    @property
    def graph_refused(self) -> str | None:
        """Why the step could not be captured, where it could not be: it is launched kernel by kernel then."""
        graphs = getattr(self.engines["step"].backend, "graphs", None)
        return None if graphs is None else graphs.refused

    def plan(self, request: Request, seed: int) -> Branch:
        """One branch by the planner's engine."""
        prompt = {name: tensor.numpy() for name, tensor in request.prompt(seed).items()}
        found: dict[str, Any] = {
            name: array[0] for name, array in self.engines["planner"].run_keeping(["context"], prompt, EngineClock()).items()
        }
        return Branch(found["context"], prompt["attention_mask"][0], found["canvas"], found.get("pooled"))

    def batch(self, request: Request, branches: list[Branch], schedule: Schedule) -> StepBatch:
        """The step engine's inputs."""
        scale = self.subject.guidance
        branch_weights = np.array([scale, 1 - scale] if len(branches) == 2 else [1.0], np.float32)
        conditions = dict(request.conditions)
        if "pooled" in conditions:
            conditions["pooled"] = np.stack([[branch.pooled for branch in branches]])
        noise = request.noise * np.float32(schedule.init_noise_sigma)
        return step_batch(self.engines["step"].spec, noise, [branches], branch_weights, conditions)

    def draw(self, request: Request, watch: Stopwatch, steps: int) -> Tensor:
        """The request once, as the runtime goes: the negative prompt's plan is there already."""
        schedule = self._schedules(steps)
        if self._negative is None and self.subject.branches > 1 and not self.given:
            self._negative = self.plan(request, 1)
        branches = self.given
        if not branches:
            with watch.stage("plan"):
                branches = [self.plan(request, 0), *([] if self._negative is None else [self._negative])]
        with watch.stage("batch"):  # on the host, as the runtime does it
            batch = self.batch(request, branches, schedule)
        with watch.stage("denoise"):
            latents = denoise(self.engines["step"], batch, schedule, EngineClock(), _Nobody())
        if "vae_decoder" in self.engines:
            with watch.stage("decode"):
                self.engines["vae_decoder"].run({"latents": latents}, EngineClock())
        return torch.from_numpy(np.array(latents))
