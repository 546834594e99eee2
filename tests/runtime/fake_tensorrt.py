"""A machine with a GPU and TensorRT that are stand-ins, and one engine for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.backends import tensorrt as home
from mc_runtime.backends.base import Backend, Engine, Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.backends.tensorrt import TensorRtBackend
from mc_runtime.backends.trt_libraries import TrtLibrary
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision, Tensor
from tests.runtime.fake_gpu import FakeCuda, FakeTrt

TENSORS = {
    "sample": (True, "float32", (-1, 3)),
    "ids": (True, "int64", (-1,)),
    "next": (False, "float32", (-1, 3)),
}
SPEC = EngineSpec(
    target="tensorrt",
    precision=Precision.BF16,
    files=("step.engine",),
    inputs=(Tensor(name="sample", dtype="float32", shape=("B", 3)), Tensor(name="ids", dtype="int64", shape=("B",))),
    outputs=(Tensor(name="next", dtype="float32", shape=("B", 3)),),
    options={
        "version": FakeTrt.__version__, "capabilities": ["8.9"], "gpu_bytes": 100,
        "profiles": [{"B": [1, 1, 2]}, {"B": [2, 4, 8]}],
    },
)  # fmt: skip
TARGETS = ("tensorrt", "tensorrt-rtx")


def compute(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"next": (inputs["sample"] * 2 + inputs["ids"][:, None]).astype(np.float32)}


class Gpu:
    """A machine with one: the two stand-ins, and a plan's file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = FakeCuda()
        self.trt = FakeTrt(self.cuda, TENSORS, compute)
        self.folder = folder
        self.plan = folder / "step.engine"
        self.plan.write_bytes(b"plan of a fake")
        monkeypatch.setattr(home, "load_cuda", lambda: self.cuda)
        monkeypatch.setattr(TrtLibrary, "load", lambda library: self.trt)

    def backend(self, target: str = "tensorrt", **settings: Any) -> TensorRtBackend:
        made = create_backend(target, Settings(**settings))
        assert isinstance(made, TensorRtBackend)
        return made

    def load(self, backend: Backend, **options: Any) -> Engine:
        spec = replace(SPEC, target=backend.name, options={**SPEC.options, **options})
        return backend.load("step", (self.plan,), spec)


def inputs_of(backend: Backend, batch: int, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    generator = np.random.default_rng(seed)
    arrays = {"sample": generator.standard_normal((batch, 3)).astype(np.float32), "ids": generator.integers(0, 9, batch)}
    return {name: backend.to_device(array) for name, array in arrays.items()}, compute(arrays)["next"]
