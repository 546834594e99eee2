"""Engines that take LoRAs, as libraries run them, give what their programs give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import SanaPipeline

from mc_export.build import BuildOptions, build_bundle
from mc_runtime import Runtime
from tests.factories import tiny_stock_sana
from tests.program_bundle import programs_as_engines
from tests.random_lora import LAYERS, random_lora

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.matrix]

STEPS = 3
PROMPTS = ["a red circle", "two green triangles"]


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "inductor"])
def test_engines_with_adapters_equal_their_programs(tmp_path: Path, target: str) -> None:
    checkpoint = tiny_stock_sana(tmp_path / "checkpoint")
    pipeline = SanaPipeline.from_pretrained(str(checkpoint))
    file = random_lora(pipeline, tmp_path / "adapter", seed=1, rank=4, alpha=6.0, layers=LAYERS)
    arguments: dict[str, Any] = {"size": (64, 32), "steps": STEPS, "output": "latents", "lora": {"style": 0.8}}

    def latents(runtime: Runtime) -> Any:
        runtime.load_lora(file, "style")
        return runtime.generate(PROMPTS, **arguments).latents

    with programs_as_engines(tmp_path / "cache") as build:
        expected = latents(build(checkpoint, tmp_path / "programs", lora_rank=6))
    report = build_bundle(checkpoint, tmp_path / "bundle", BuildOptions(target=target, max_steps=STEPS, lora_rank=6))
    found = latents(Runtime.load(report.path, threads=1))
    assert np.abs(found - expected).max() < 3e-4 * (expected.max() - expected.min())
