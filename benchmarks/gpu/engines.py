"""Our programs as engines: run by torch on the device, or compiled to a package by the target `inductor-cuda`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import weights
from benchmarks.gpu.device import Device
from benchmarks.gpu.pipelines import Ours, Reference, Request
from benchmarks.gpu.subjects import Subject, subject
from benchmarks.gpu.ways import Way, compile_blocks
from mc_export.autoencoders.registry import vae_program
from mc_export.lower import lower_program
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.model.injection import CanvasBackbone
from mc_export.model.planner import Planner
from mc_export.program.base import Program
from mc_export.program.planner import PlannerProgram
from mc_export.program.step import StepProgram
from mc_export.sampler import build_sampler_table
from mc_runtime.backends.base import Backend, Buffer, Settings
from mc_runtime.backends.cuda_graphs import GraphCache
from mc_runtime.backends.device_buffers import BufferPool
from mc_runtime.backends.inductor_cuda import Graphs, InductorCudaBackend, InductorCudaEngine
from mc_runtime.backends.packages import described_signature, signature_described
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.plan import Branch
from mc_runtime.sampling.tables import SamplerTable

_SPEC = "package.json"


class Launched:
    """In the place of graphs: launches as they come."""

    def warm_up(self, launches: Callable[[], None]) -> None:
        """See `Recorder.warm_up`."""
        launches()

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder.capture`."""
        return launches


class ProgramBackend(InductorCudaBackend):
    """The production backend's buffers and graphs for programs that are not compiled; on a CPU a graph is a plain call."""

    def __init__(self, device: Device, graph: bool) -> None:
        Backend.__init__(self, Settings())
        self._pool = BufferPool(lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device=device.torch))
        self.graphs = GraphCache(Graphs() if graph and device.is_cuda else Launched())
        self._is_cuda = device.is_cuda

    def ask_finite(self, buffer: Buffer) -> Callable[[], bool]:
        """See `Backend.ask_finite`; without a GPU the answer is there at once."""
        return super().ask_finite(buffer) if self._is_cuda else Backend.ask_finite(self, buffer)


class ProgramEngine(InductorCudaEngine):
    """A program in the place of its package."""

    def __init__(self, program: Program, backend: ProgramBackend) -> None:
        self.name, self.path = program.component, Path(f"{program.component} program")
        self.spec = EngineSpec(
            target=backend.name, precision=Precision.BF16, files=("program",), inputs=program.inputs, outputs=program.outputs
        )
        self._backend, self._program, self.serial = backend, program, id(self)

    def compute(self, tensors: list[Any]) -> list[Any]:
        """Outputs in the signature's order."""
        found = self._program(**{spec.name: tensor for spec, tensor in zip(self.spec.inputs, tensors, strict=True)})
        return list(found) if isinstance(found, tuple) else [found]

    def _check(self, inputs: Any) -> None:
        """A program takes what its module takes."""


def sampler_of(chosen: Subject, config: Any) -> SamplerTable:
    """The coefficients of the step counts that are run; those of a whole request too, which decide the order."""
    adapter = chosen.adapter
    counts = {chosen.checked_steps, chosen.loop, chosen.steps}
    scheduler = chosen.scheduler()
    return build_sampler_table(
        scheduler, max_steps=max(counts), step_counts=sorted(counts), timestep_scale=adapter.timestep_scale(config),
        set_timesteps=adapter.set_timesteps(scheduler), token_counts=[_tokens(chosen, config)] if _dynamic(scheduler) else (),
    )  # fmt: skip


def _dynamic(scheduler: Any) -> bool:
    return bool(scheduler.config.get("use_dynamic_shifting"))


def _tokens(chosen: Subject, config: Any) -> int:
    cells = 1
    for extent, patch in zip(chosen.latent[1:], chosen.adapter.patch(config)[-len(chosen.latent[1:]) :], strict=True):
        cells *= extent // patch
    return cells


def programs_of(reference: Reference, device: Device, way: Way, order: int) -> tuple[dict[str, Program], Any]:
    """Planner, step and decoder with the reference's weights, and what prepares a context that is given."""
    chosen, place = reference.subject, device.torch
    model = weights.twin(chosen.model, reference.model, place)
    config = model.config
    # Each program changes what it is given, so that each has a canvas of its own, as in a build.
    canvas, drawing = (
        weights.twin(lambda: weights.canvas_model(chosen, config), reference.canvas, place) for _ in ("step", "planner")
    )
    backbone = CanvasBackbone(chosen.adapter, model, canvas.canvas_connector).eval()
    width, prepared = chosen.adapter.width(config), chosen.adapter.prepared_context_width(config)
    keyframes = chosen.grid[0]
    with place:
        preparation = chosen.adapter.context_preparation(model).to(torch.bfloat16)
        step = StepProgram(backbone, prepared, order=order, keyframes=keyframes)
        for change in way.changes:
            change(step)
    programs: dict[str, Program] = {"step": step}
    if chosen.planner is not None:
        size = chosen.planner
        qwen = weights.twin(lambda: weights.planner_model(size), reference.qwen, place)
        planner = Planner(qwen, drawing.canvas_tokens).eval()
        with place:
            programs["planner"] = PlannerProgram(planner, drawing, width, preparation, prepared, keyframes=keyframes)
    if chosen.autoencoder is not None:
        programs["vae_decoder"] = vae_program("vae_decoder", weights.twin(chosen.autoencoder, reference.vae, place))
    if not way.package:  # a package is lowered by its target
        compute_in_bf16(step)
    for name, program in programs.items():
        if name != "step":
            compute_in_bf16(program)
        program.requires_grad_(False).eval().to(place)
    return programs, preparation


def ours_of(
    reference: Reference, request: Request, device: Device, way: Way, table: SamplerTable, package: Path | None = None
) -> tuple[Ours, int]:
    """Our way of the request, and how many bytes its weights take."""
    chosen = reference.subject
    programs, preparation = programs_of(reference, device, way, table.order)
    if way.compiled or way.package:
        compiled = [program for name, program in programs.items() if name != "step" or way.compiled]
        compile_blocks(*compiled, backend=device.backend)
    backend = ProgramBackend(device, way.graph)
    engines = {
        name: LoadedEngine(engine.spec, backend, engine)
        for name, engine in ((name, ProgramEngine(program, backend)) for name, program in programs.items())
    }
    if way.package:
        if package is None:
            raise EngineError("no package was built")
        del programs["step"]
        engines["step"] = loaded_package(package)
    held = weights.bytes_of(*programs.values())
    held += int(engines["step"].spec.options.get("gpu_bytes", 0))
    tokens = _tokens(chosen, reference.model.config) if table.is_dynamic else None
    ours = Ours(chosen, device, engines, lambda steps: table.schedule(steps, tokens))
    if chosen.planner is None:
        for seed in range(chosen.branches):
            given = reference.branch(request, seed)
            context = preparation(given.context)[0].float().cpu().numpy()
            assert given.canvas is not None
            canvas = given.canvas[0].float().cpu().numpy()
            ours.given.append(Branch(context, given.mask[0].cpu().numpy(), canvas))
    return ours, held


def build_package(name: str, folder: Path, dry: bool) -> None:
    """Compiles a subject's step for `inductor-cuda` into `folder`: what the build does, from weights drawn as the section's."""
    torch.set_grad_enabled(False)
    device = Device("cpu" if dry else "cuda")
    chosen = subject(name, dry)
    reference = Reference(chosen, device)
    table = sampler_of(chosen, reference.model.config)
    step = programs_of(reference, device, Way("package", ours=True, package=True), table.order)[0]["step"].cpu()
    del reference
    device.release()
    signature = described_signature(step.inputs, step.outputs)
    target = "inductor" if dry else "inductor-cuda"
    files, options = lower_program(target, step, Precision.BF16, folder)
    made = {"target": target, "files": [file.name for file in files], "options": options, "signature": signature}
    (folder / _SPEC).write_text(json.dumps(made))


def loaded_package(folder: Path) -> LoadedEngine:
    """The step engine that `build_package` left in `folder`."""
    made = json.loads((folder / _SPEC).read_text())
    inputs, outputs = signature_described(made["signature"])
    here = made["target"] == InductorCudaBackend.name
    # Not by way of the registry, which looks for a driver's file that some virtual machines do not show.
    backend = InductorCudaBackend(Settings()) if here else create_backend(made["target"], Settings())
    spec = EngineSpec(
        target=made["target"], precision=Precision.BF16, files=tuple(made["files"]), inputs=inputs, outputs=outputs,
        options=made["options"],
    )  # fmt: skip
    return LoadedEngine(spec, backend, backend.load("step", tuple(folder / file for file in made["files"]), spec))


class PackageBuild:
    """`build_package` in a process of its own, beside the section's other preparations; what it writes lies in memory."""

    def __init__(self, name: str) -> None:
        shared = Path("/dev/shm")
        self._folder = tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None, prefix="mc-gpu-")
        self.folder = Path(self._folder.name)
        self._log = self.folder / "log"
        self._start = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--build-package", name, "--folder", str(self.folder)],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.seconds = 0.0

    def wait(self, seconds: float) -> Path:
        """The folder. Raises EngineError where it fails or takes longer than `seconds` from now."""
        try:
            status = self._process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            raise EngineError(f"the package was not compiled in {time.perf_counter() - self._start:.0f} s") from None
        self.seconds = time.perf_counter() - self._start
        if status:
            last = (self._log.read_text().strip().splitlines() or [""])[-1]
            raise EngineError(f"the package was not compiled: {last[:300]}")
        return self.folder

    def end(self) -> None:
        """Stops it and what it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def close(self) -> None:
        """Removes what it wrote."""
        self.end()
        self._folder.cleanup()
