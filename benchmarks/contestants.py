"""Who is timed: the torch reference in its variants, bundles, and optimum-onnx in an environment of its own.

Each fulfils `mc_runtime.bench.Contestant`; `picture` gives the numbers that are checked before anything is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint
from mc_export.reference.pipeline import Conditions, ReferencePipeline
from mc_runtime import Runtime
from mc_runtime.bench import BenchRequest, BundleContestant, Contestant
from mc_runtime.sampling.noise import initial_noise

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Drawn(NamedTuple):
    """Final latents [1, C, (T,) H, W], and the pixels of the picture, uint8 [h, w, 3], or of all frames [F, h, w, 3]."""

    latents: NDArray[np.float32]
    pixels: NDArray[np.uint8]


class Rival(Contestant):
    """A contestant that shows what it draws."""

    def picture(self) -> Drawn:
        """Draw once and show it."""
        raise AssertionError("each contestant says how")


@dataclass(frozen=True)
class Environment:
    """An interpreter where optimum-onnx is installed (it needs an older transformers than ours)."""

    python: Path


class BundleRival(BundleContestant, Rival):
    """A bundle; the plan is made anew for every picture."""

    def __init__(self, name: str, bundle: Path, request: BenchRequest) -> None:
        runtime = Runtime.load(bundle, threads=request.threads)
        super().__init__(runtime, request)
        self.name = name

    @property
    def engines(self) -> dict[str, str]:
        """Component to target and precision."""
        engines = sorted(self.runtime.manifest.engines.items())
        return {component: f"{engine.target}:{engine.precision}" for component, engine in engines}

    @property
    def engine_errors(self) -> dict[str, float]:
        """Relative L2 error of each engine against its torch module, as measured when it was built."""
        engines = sorted(self.runtime.manifest.engines.items())
        return {component: engine.error.relative_l2 for component, engine in engines if engine.error}

    def picture(self) -> Drawn:
        """Draw once and show it."""
        self.runtime.forget_plans()
        result = self.runtime.generate(self._prompt, **self._arguments)
        return Drawn(result.latents, result.clips[0].frames if result.clips else np.asarray(result.images[0]))


class TorchRival(Rival):
    """The reference pipeline in `precision`, eager or with its backbone and its decoder compiled."""

    def __init__(self, checkpoint: Path, request: BenchRequest, precision: str, *, compiled: bool = False) -> None:
        self.name = f"torch {'compile' if compiled else 'eager'} {precision}"
        self._pipeline = TimedReference(load_checkpoint(checkpoint), DTYPES[precision])
        if compiled:
            self._pipeline.backbone = torch.compile(self._pipeline.backbone)
            self._pipeline.vae.decoder = torch.compile(self._pipeline.vae.decoder)
        self._prompt = request.prompt
        self._arguments = request.arguments

    def latents(self) -> NDArray[np.float32]:
        """Final latents [1, C, H, W]."""
        return self.picture().latents

    def picture(self) -> Drawn:
        """Draw once and show it."""
        result = self._pipeline.generate(self._prompt, **self._arguments)
        if result.clips:
            return Drawn(result.latents, np.round(result.clips[0] * 255).astype(np.uint8))
        return Drawn(result.latents, np.asarray(result.images[0]))

    def draw(self) -> dict[str, float]:
        """Draw once; seconds per stage."""
        self._pipeline.seconds.clear()
        self._pipeline.step_seconds.clear()
        self._pipeline.generate(self._prompt, **self._arguments)
        return dict(self._pipeline.seconds)


class TimedReference(ReferencePipeline):
    """The reference pipeline, telling how long its stages take."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(checkpoint, dtype)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.step_seconds: list[float] = []

    def conditions(self, *args: Any, **kwargs: Any) -> Conditions:
        """Timed as `plan`."""
        return self._timed("plan", super().conditions, *args, **kwargs)

    def denoise(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Timed as `denoise`."""
        return self._timed("denoise", super().denoise, *args, **kwargs)

    def _predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Every call is one step; the sampler's own arithmetic is left out."""
        start = time.perf_counter()
        prediction = super()._predict(*args, **kwargs)
        self.step_seconds.append(time.perf_counter() - start)
        return prediction

    def decode(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        """Timed as `decode`."""
        return self._timed("decode", super().decode, *args, **kwargs)

    def decode_clips(self, *args: Any, **kwargs: Any) -> list[NDArray[np.float32]]:
        """Timed as `decode`."""
        return self._timed("decode", super().decode_clips, *args, **kwargs)

    def _timed(self, stage: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds[stage] += time.perf_counter() - start
        return result


class OptimumRival(Rival):
    """optimum-onnx's `ORTSanaPipeline`, in a process of another environment that waits between its rounds."""

    name = "optimum-onnx fp32"

    def __init__(self, environment: Environment, checkpoint: Path, engines: Path, request: BenchRequest, noise: Any) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        np.save(folder / "noise.npy", noise)
        assert request.size is not None
        task = {
            "checkpoint": str(checkpoint), "engines": str(engines), "folder": str(folder), "prompt": request.prompt,
            "steps": request.steps, "guidance": request.guidance, "height": request.size[0], "width": request.size[1],
            "threads": request.threads,
        }  # fmt: skip
        worker = Path(__file__).with_name("optimum_worker.py")
        self._process = subprocess.Popen(
            [environment.python, "-W", "ignore", worker, json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_clean_environment(),
        )  # fmt: skip
        self.versions = self._answer()

    def latents(self) -> NDArray[np.float32]:
        """Final latents [1, C, H, W]."""
        return self.picture().latents

    def picture(self) -> Drawn:
        """Draw once and show it."""
        self._ask("picture")
        folder = Path(self._folder.name)
        return Drawn(np.load(folder / "latents.npy"), np.load(folder / "pixels.npy"))

    def draw(self) -> dict[str, float]:
        """Draw once; seconds per stage."""
        return {stage: float(seconds) for stage, seconds in self._ask("draw").items()}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._folder.cleanup()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # libraries print notes; an answer is a JSON object on its own line
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"optimum-onnx's process ended with exit status {self._process.wait()}; see its messages above")


def noise_of(request: BenchRequest, channels: int, pixels_per_cell: int) -> NDArray[np.float32]:
    """The request's initial latents [1, C, H, W]: the runtime's and the reference's own."""
    assert request.size is not None
    height, width = (side // pixels_per_cell for side in request.size)
    return initial_noise(request.seed, (channels, height, width))[None]


def _clean_environment() -> dict[str, str]:
    """This process's environment without what points Python at our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
