"""What tests of plans with single layers in FP8 or INT4 share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mc_export.build.calibrate import program_of
from mc_export.build.layer_choice import LayerChoice
from mc_export.build.options import EngineChoice
from mc_export.build.plan import PlanWishes, make_plan
from mc_export.build.verify import tolerance_of
from mc_export.checkpoint import load_checkpoint
from mc_export.quantize.calibration import calibration_inputs
from mc_runtime.bundle.manifest import Engine
from tests.factories import tiny_metacanvas_checkpoint


def planner_plan(folder: Path, choice: EngineChoice, capabilities: tuple[str, ...]) -> tuple[Engine, dict[str, Any]]:
    """A tiny planner's plan, checked as every one of these is, and what the manifest notes of its layers."""
    checkpoint = load_checkpoint(tiny_metacanvas_checkpoint(folder / "checkpoint", seed=31, layers=1))
    inputs = calibration_inputs(checkpoint, "planner")
    layers = LayerChoice(checkpoint, None, force=False)
    engine = make_plan(
        lambda: program_of(checkpoint, "planner", inputs), choice, folder, PlanWishes({}, capabilities=capabilities),
        enter=lambda state: None, tick=lambda share: None, calibrate=lambda component: inputs,
        to_layers=lambda program: layers.apply(program, choice),
    )  # fmt: skip
    assert (folder / engine.files[0]).stat().st_size == engine.options["gpu_bytes"] > 0
    assert engine.options["capabilities"] == list(capabilities)
    notes: dict[str, Any] = engine.options[choice.precision.value]
    assert notes["error"] <= notes["loss"]
    assert engine.error is not None
    assert engine.error.of == "graph"
    assert 0.2 * notes["error"] < engine.error.relative_l2 <= tolerance_of(engine)
    return engine, notes
