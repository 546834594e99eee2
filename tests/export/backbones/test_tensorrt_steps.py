"""Every backbone's step as a plan of TensorRT for RTX, its graph run by onnxruntime against its module.

SANA's are in `tests/export/test_tensorrt.py`, with its other engines; whole bundles, of every checkpoint, in
`tests/integration/test_tensorrt_plans.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mc_export.build.options import EngineChoice
from mc_export.build.plan import PlanWishes, make_plan
from mc_export.program.base import Program
from mc_runtime.bundle.manifest import Precision
from tests.factories_unet import tiny_animatediff, tiny_sdxl, tiny_svd
from tests.tiny_flux import tiny_flux
from tests.tiny_steps import tiny_step
from tests.tiny_wan import tiny_wan

pytest.importorskip("tensorrt_rtx")

# As few blocks as the model can have: an operator that the library cannot read is in the first one.
MODELS: dict[str, Any] = {
    "flux-kontext": lambda: tiny_flux(5, num_layers=1, num_single_layers=1),
    "wan-clips": lambda: tiny_wan(6, clips=True, num_layers=1),
    "sdxl": lambda: tiny_sdxl(7, transformer_layers_per_block=1),
    "animatediff": lambda: tiny_animatediff(8),
    "svd": lambda: tiny_svd(9),
}


# UNets over frames take a minute each.
LONG = ("animatediff", "svd")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.matrix] * (name in LONG)) for name in MODELS])
def test_a_step_becomes_a_plan(name: str, tmp_path: Path) -> None:
    program: Program = tiny_step(name, model=MODELS[name]())
    engine = make_plan(
        lambda: program,
        EngineChoice("tensorrt-rtx", Precision.FP32),
        tmp_path,
        PlanWishes(usual={"B": 1}, capabilities=("8.9",)),
        enter=lambda state: None,
        tick=lambda share: None,
        calibrate=lambda component: [],
    )
    assert engine.options["capabilities"] == ["8.9"]
    assert [file.name for file in tmp_path.iterdir()] == ["step.engine"]
    assert engine.error is not None
    assert 0 < engine.error.relative_l2 < 2e-5
    assert len(engine.error.shapes) == 3
