"""What to build."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mc_runtime.backends.registry import runs_on_gpu
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES
from mc_runtime.bundle.engines import LORA_SUFFIX, STEP, STEPS
from mc_runtime.bundle.manifest import Component, Precision
from mc_runtime.errors import RequestError

COMPONENTS: tuple[Component, ...] = ("vision", "planner", "text_encoder", "image_encoder", "step", "vae_decoder", "vae_encoder")
PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "onnxruntime": (Precision.FP32, Precision.INT8),
    "openvino": (Precision.FP32, Precision.BF16, Precision.INT8),
    "inductor": (Precision.FP32, Precision.BF16),
    "inductor-cuda": (Precision.FP32, Precision.BF16, Precision.FP8),
    "tensorrt": (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8, Precision.INT4),
    "tensorrt-rtx": (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8, Precision.INT4),
}

BY_LAYER = (Precision.FP8, Precision.INT4)
"""Precisions of single layers, chosen by what each costs; the rest of the engine is in bf16."""
BY_LAYER_COMPONENTS: tuple[Component, ...] = ("planner", "step")
"""The engines whose products are worth it: the others run once a request, on few rows or by convolutions."""

_MAX_LORA_RANK = 512


@dataclass(frozen=True)
class EngineChoice:
    """The library that runs an engine, and what it computes in.

    Raises:
        RequestError: there is no such target, or it has no such precision; the message says what there is.
    """

    target: str
    precision: Precision

    def __post_init__(self) -> None:
        if self.target not in PRECISIONS:
            raise RequestError(f"target {self.target!r} is unknown; choose {' or '.join(PRECISIONS)}")
        if self.precision not in PRECISIONS[self.target]:
            there = ", ".join(PRECISIONS[self.target])
            others = [target for target, precisions in PRECISIONS.items() if self.precision in precisions]
            instead = f", or {others[0]}:{self.precision}" if others else ""
            raise RequestError(f"{self.target} has no {self.precision}; choose {there}{instead}")

    @property
    def is_quantized(self) -> bool:
        """Whether building it needs calibration."""
        return self.precision is Precision.INT8 or self.is_by_layer

    @property
    def is_by_layer(self) -> bool:
        """Whether single layers are in this precision, and the rest in bf16."""
        return self.precision in BY_LAYER


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        target, precision: of every engine that `engines` does not name.
        engines: component to its own target and precision. Naming `vae_encoder` also puts it into the bundle: no
            text-to-image request needs it.
        sizes: the only picture sizes (height, width) to serve; empty for every size the checkpoint can do.
        max_batch: the most images a step takes at once.
        max_steps: the largest step count to serve.
        compute_capabilities: of the GPUs that `tensorrt-rtx` builds for, such as `8.9`; none for Ampere and later.
        fallback: target and precision of a second set of engines, on a CPU, for machines that cannot run the first.
        lora_rank: the largest rank of a request's LoRAs together; 0 for a bundle that takes none.
        step_cache: whether requests may keep residuals between steps.
        cache_loss: what its threshold is calibrated to: relative L2 difference of the final latents.
        calibration: a file of `mc-runtime calibrate`, which says what stays in bf16 in an fp8 or int4 engine; None measures
            it now.
        force: build every engine again, whatever the cache has.

    Raises:
        RequestError: a value that no checkpoint could serve.
    """

    target: str = "onnxruntime"
    precision: Precision = Precision.FP32
    engines: Mapping[Component, EngineChoice] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    max_batch: int = 8
    max_steps: int = 100
    compute_capabilities: tuple[str, ...] = ()
    fallback: EngineChoice | None = None
    lora_rank: int = 0
    step_cache: bool = False
    cache_loss: float = 0.05
    calibration: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        EngineChoice(self.target, self.precision)
        for component in self.engines:
            if component not in COMPONENTS:
                raise RequestError(f"component {component!r} is unknown; choose {', '.join(COMPONENTS)}")
            choice = self.engines[component]
            if choice.is_by_layer and component not in BY_LAYER_COMPONENTS:
                raise RequestError(
                    f"--engine {component}={choice.target}:{choice.precision}: {choice.precision} is for "
                    f"{' and '.join(BY_LAYER_COMPONENTS)}; take {choice.target}:bf16"
                )
        for name, value, limit in (("max_batch", self.max_batch, 256), ("max_steps", self.max_steps, 1000)):
            if not 1 <= value <= limit:
                raise RequestError(f"{name} must be 1 to {limit}, got {value}")
        if self.fallback is not None and runs_on_gpu(self.fallback.target):
            raise RequestError(f"fallback {self.fallback.target}: needs a GPU itself; choose onnxruntime or openvino")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise RequestError(f"compute capability {capability!r}: expected one such as 8.9")
        if self.compute_capabilities and not any(self.choice(one).target in TRT_LIBRARIES for one in COMPONENTS):
            raise RequestError(
                "--compute-capability: is of TensorRT's plans, and no engine here is a plan; say --target tensorrt-rtx, or "
                "leave it out"
            )
        if not 0 <= self.lora_rank <= _MAX_LORA_RANK:
            raise RequestError(f"lora_rank must be 0 to {_MAX_LORA_RANK}, got {self.lora_rank}")
        if not 0 < self.cache_loss < 1:
            raise RequestError(f"cache_loss must be more than 0 and less than 1, got {self.cache_loss:g}")
        if self.calibration is not None and not any(self.choice(one).is_by_layer for one in BY_LAYER_COMPONENTS):
            raise RequestError("--calibration: is of fp8 and int4 engines; say --precision fp8, or leave it out")
        step = self.choice(STEP)
        if self.step_cache and step.is_by_layer:
            raise RequestError(
                f"--cache: cuts the step, and {step.precision} is calibrated on a whole one; say --engine "
                f"step={step.target}:bf16, or leave --cache out"
            )
        for height, width in self.sizes:
            if height < 1 or width < 1:
                raise RequestError(f"size {height}x{width}: height and width must be positive")

    def choice(self, component: Component) -> EngineChoice:
        """Target and precision of one component.

        Both engines of a clip's chunks have one, since they share their caches; an engine that takes LoRAs, and a part of a
        step, has that of the one it stands in for. A bundle in fp8 or int4 has the engines that it is not for in bf16.
        """
        named = component.removesuffix("_next").removesuffix(LORA_SUFFIX)
        named = STEP if named in STEPS else named
        chosen = self.engines.get(named) or EngineChoice(self.target, self.precision)
        if chosen.is_by_layer and named not in BY_LAYER_COMPONENTS:
            return EngineChoice(chosen.target, Precision.BF16)
        return chosen
