"""FP8 plans of TensorRT for RTX, built without a GPU: a planner's always, all of SANA, FLUX and Wan in the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_export.backbones.registry import BACKBONES
from mc_export.build import BuildOptions, build_bundle
from mc_export.build.options import EngineChoice
from mc_export.build.verify import TOLERANCE, tolerance_of
from mc_runtime.bundle.manifest import Precision
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import RequestError
from tests.factories import tiny_metacanvas_checkpoint
from tests.integration.layer_plans import planner_plan
from tests.tiny_backbones import tiny_checkpoint

pytest.importorskip("tensorrt_rtx")

CHOICE = EngineChoice("tensorrt-rtx", Precision.FP8)


def test_a_planner_builds_in_fp8(tmp_path: Path) -> None:
    engine, notes = planner_plan(tmp_path, CHOICE, ("8.9", "12.0"))
    assert notes["activations"] == "tensor"
    assert tolerance_of(engine) < 2 * (notes["loss"] + TOLERANCE[Precision.BF16])


@pytest.mark.parametrize(("capability", "said"), [
    ("8.6", r"-capability 8\.6: fp8 needs compute capability 8\.9, 8\.6 has none; build with --precision int8 or bf16"),
    ("9.0", "tensorrt-rtx builds for .*8.9, 12.0"),
])  # fmt: skip
def test_gpus_without_fp8_are_refused_before_anything_is_built(tmp_path: Path, capability: str, said: str) -> None:
    checkpoint = tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=31, layers=1)
    options = BuildOptions(target="tensorrt-rtx", precision=Precision.FP8, compute_capabilities=(capability,), max_steps=4)
    with pytest.raises(RequestError, match=said):
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sana", "flux", "flux-kontext", "wan"])
def test_planner_and_step_build_in_fp8(name: str, tmp_path: Path) -> None:
    backbone = next(each for each in BACKBONES if each.name == name)
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", backbone, "metacanvas")
    plain = EngineChoice("onnxruntime", Precision.FP32)
    options = BuildOptions(
        engines={"planner": CHOICE, "step": CHOICE}, max_steps=4, max_batch=2, compute_capabilities=("8.9", "12.0")
    )
    assert options.choice("vae_decoder") == plain
    build_bundle(checkpoint, tmp_path / "bundle", options)
    engines = open_bundle(tmp_path / "bundle").manifest.engines
    for component in ("planner", "step"):
        engine = engines[component]
        assert (engine.target, engine.precision) == ("tensorrt-rtx", Precision.FP8)
        assert engine.options["fp8"]["error"] <= engine.options["fp8"]["loss"]
        assert engine.options["fp8"]["kept_work"] < 0.9
        assert engine.error is not None
        assert engine.error.of == "graph"
