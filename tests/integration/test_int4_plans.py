"""INT4 plans of TensorRT for RTX, built without a GPU: a planner's always, every backbone's step in the matrix."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from mc_export.build import BuildOptions, build_bundle
from mc_export.build.options import EngineChoice
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.lower.onnx import BF16_OPSET, onnx_from_program
from mc_export.lower.tensorrt import PlanOrder, capabilities_for, plan_file
from mc_export.lower.trt_profiles import profiles_of
from mc_export.program.export import export_program
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.sites import find_sites, put_fp8
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import RequestError
from tests.factories import tiny_metacanvas_checkpoint
from tests.integration.layer_plans import planner_plan
from tests.tiny_steps import KINDS, sizes_for, tiny_step

pytest.importorskip("tensorrt_rtx")

CHOICE = EngineChoice("tensorrt-rtx", Precision.INT4)


def test_a_planner_builds_in_int4(tmp_path: Path) -> None:
    _, notes = planner_plan(tmp_path, CHOICE, ("8.0", "12.0"))
    assert notes["activations"] == "blocks"
    assert notes["kept_work"] < 0.9


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.BF16])
def test_gpus_without_it_are_refused_before_anything_is_built(tmp_path: Path, precision: Precision) -> None:
    checkpoint = tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=31, layers=1)
    options = BuildOptions(target="tensorrt-rtx", precision=precision, compute_capabilities=("7.5", "8.0"), max_steps=4)
    said = rf"-capability 7\.5: {precision} needs compute capability 8\.0, 7\.5 has none; build with --precision fp16"
    with pytest.raises(RequestError, match=said):
        build_bundle(checkpoint, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()
    assert capabilities_for("tensorrt-rtx", (), precision) == ("8.0", "8.6", "8.9", "12.0")


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_builds_in_int4(kind: str, tmp_path: Path) -> None:
    """With all layers that can be in INT4, whatever they cost."""
    program, reference = tiny_step(kind), tiny_step(kind)
    feed = program.example(sizes_for(program, large=True), seed=3)
    sites = find_sites(program, [feed], Activations.BLOCKS)
    put_fp8(program, sites, Activations.BLOCKS)
    layers = sum(len(site.layers) for site in sites)
    program = compute_in_bf16(program)
    found, expected = program.run(feed)["next_sample"], reference.run(feed)["next_sample"]
    error = float((found - expected).norm() / expected.norm())
    assert 1e-3 < error < 0.5, error
    exported = export_program(program)
    graph = onnx_from_program(exported, program.inputs, program.outputs, tmp_path / "step.onnx", opset=BF16_OPSET)
    stored = [tensor.data_type for tensor in onnx.load(graph.path).graph.initializer]
    # Wan has two timesteps, that of the frames it is given and the others', and the connector's three layers for each.
    assert stored.count(onnx.TensorProto.INT4) == layers + 3 * kind.startswith("wan")
    order = PlanOrder("step", CHOICE.target, CHOICE.precision, program.inputs, program.outputs, profiles_of(program.axes, {}))
    (plan,), options = plan_file(graph, order, tmp_path)
    assert options["capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert plan.stat().st_size == options["gpu_bytes"] > 0
