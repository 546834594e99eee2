"""Plans by TensorRT for RTX, which builds without a GPU: what it reads, what it refuses, progress, and stopping it."""

from __future__ import annotations

import errno
import io
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mc_export.build.options import BuildOptions, EngineChoice
from mc_export.build.plan import checked_extents
from mc_export.lower.onnx import OnnxFile
from mc_export.lower.tensorrt import DEFAULT_CAPABILITIES, PlanOrder, capabilities_for, plan_facts, plan_file
from mc_export.lower.trt_monitor import Phases
from mc_export.lower.trt_profiles import profiles_of
from mc_export.program.base import Axis
from mc_runtime.backends.trt_plans import TrtPlan
from mc_runtime.bundle.manifest import Engine, Precision, Tensor
from mc_runtime.errors import EngineError, RequestError
from tests.export.conftest import Exported
from tests.export.test_engines import COMPONENTS

trt = pytest.importorskip("tensorrt_rtx")

AXES = {"B": Axis("B", 1, 4, 2), "H": Axis("H", 4, 64, 8, 4), "L": Axis("L", 1, 100, 7)}
ONE_PROFILE = ({"B": (1, 1, 4)},)


def test_one_profile_over_everything_is_tuned_for_the_usual_sizes() -> None:
    assert profiles_of(AXES, {"B": 1, "H": 32}) == ({"B": (1, 1, 4), "H": (4, 32, 64), "L": (1, 25, 100)},)
    assert profiles_of(AXES, {"B": 9, "H": 31, "L": 0})[0] == {"B": (1, 4, 4), "H": (4, 28, 64), "L": (1, 1, 100)}


def test_sizes_that_are_the_only_ones_get_a_profile_each() -> None:
    served = [{"H": 16, "W": 8}, {"H": 32, "W": 8}, {"H": 16, "W": 12}]
    profiles = profiles_of(AXES, {"B": 1}, served)
    assert [profile["H"] for profile in profiles] == [(16, 16, 16), (32, 32, 32)], "the third is the first: it has no width"
    assert all(profile["B"] == (1, 1, 4) for profile in profiles)
    assert len(profiles_of(AXES, {"B": 1}, [{"W": 8}])) == 1


class _Sized:
    """What of a program decides the sizes it is checked at."""

    def __init__(self) -> None:
        self.axes = AXES
        self.example_extents = {"B": 2, "H": 8, "L": 7}

    def check_extents(self):
        yield {"B": 1, "H": 12, "L": 3}
        yield {"B": 3, "H": 12, "L": 8}


@pytest.mark.parametrize("served", [(), ({"H": 16},), ({"H": 16}, {"H": 32}, {"H": 64}, {"H": 4})])
def test_a_plan_is_checked_at_sizes_that_it_takes(served: tuple[dict[str, int], ...]) -> None:
    profiles = profiles_of(AXES, {"B": 1}, served)
    found = list(checked_extents(_Sized(), profiles))  # type: ignore[arg-type]
    assert len(found) == max(3, len(profiles))
    for index, extents in enumerate(found):
        profile = profiles[index % len(profiles)]
        assert all(profile[name][0] <= size <= profile[name][2] for name, size in extents.items())
    assert {extents["H"] for extents in found} >= {size["H"] for size in served}


def test_progress_never_falls_and_ends_at_one() -> None:
    phases, seen = Phases(), []

    def finish(name: str, steps: int, parent: str | None = None, inner: Callable[[int], None] = lambda step: None) -> None:
        phases.start(name, parent, steps)
        for step in range(steps):
            inner(step)
            phases.step(name, step)
            seen.append(phases.share)
        phases.finish(name)

    finish("all", 4, inner=lambda step: finish(f"part {step}", 3, "all") if step != 2 else None)
    finish("announced late", 2, "a phase that nobody announced")
    assert seen == sorted(seen)
    assert 0 < seen[0] < seen[1] < 0.25
    assert max(seen) == 1.0
    phases.step("never started", 1)


def order_of(program: Any, **changes: Any) -> PlanOrder:
    fields = {
        "component": program.component, "target": "tensorrt-rtx", "precision": Precision.FP32, "inputs": program.inputs,
        "outputs": program.outputs, "profiles": profiles_of(program.axes, {"B": 1}), "capabilities": ("8.9",),
    }  # fmt: skip
    return PlanOrder(**{**fields, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "component"), COMPONENTS)
def test_every_graph_of_sana_becomes_a_plan(
    exported: Callable[[str, str], Exported], checkpoint: str, component: str, tmp_path: Path
) -> None:
    case = exported(checkpoint, component)
    shares: list[float] = []
    files, options = plan_file(case.onnx, order_of(case.program, tick=shares.append), tmp_path)
    assert [file.name for file in files] == [f"{component}.engine"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    spec = Engine(
        target="tensorrt-rtx", precision=Precision.FP32, files=("engine",), inputs=case.program.inputs,
        outputs=case.program.outputs, options=options,
    )  # fmt: skip
    plan = TrtPlan.of(component, spec)
    assert plan.version == trt.__version__
    assert plan.capabilities == ("8.9",)
    assert plan.gpu_bytes == files[0].stat().st_size
    assert list(tmp_path.iterdir()) == files


def graph_of(folder: Path, *nodes: onnx.NodeProto, opset: int = 20) -> OnnxFile:
    """`x` f32 [B, 4] and `n` i64 [2] to `y`."""
    values = {
        "x": (TensorProto.FLOAT, ["B", 4]), "n": (TensorProto.INT64, [2]), "y": (TensorProto.FLOAT, ["B", 4]),
    }  # fmt: skip
    info = {name: helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in values.items()}
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    read = {name for node in nodes for name in node.input}
    inputs = [info[name] for name in ("x", "n") if name in read]
    graph = helper.make_graph(nodes, "graph", inputs, [info["y"]], [weight])
    path = folder / "step.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return OnnxFile.at(path)


def small_order(**changes: Any) -> PlanOrder:
    x = Tensor(name="x", dtype="float32", shape=("B", 4))
    y = Tensor(name="y", dtype="float32", shape=("B", 4))
    fields = {
        "component": "step", "target": "tensorrt-rtx", "precision": Precision.FP32, "inputs": (x,), "outputs": (y,),
        "profiles": ONE_PROFILE, "capabilities": ("8.9",),
    }  # fmt: skip
    return PlanOrder(**{**fields, **changes})


def test_what_the_library_cannot_read_is_one_line_with_the_operator(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
        helper.make_node("Zernike", ["a"], ["b"], name="strange"),
        helper.make_node("Legendre", ["b"], ["y"], name="stranger"),
    )
    with pytest.raises(EngineError) as caught:
        plan_file(graph, small_order(), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"step: tensorrt-rtx {trt.__version__} cannot read its graph: Zernike at strange: ")
    assert message.endswith("build this engine for another target with --engine step=onnxruntime:fp32")
    assert "\n" not in message
    assert not (tmp_path / "step.engine").exists()


def test_sizes_that_depend_on_numbers_are_refused(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, helper.make_node("Reshape", ["x", "n"], ["y"], name="reshape"))
    n = Tensor(name="n", dtype="int64", shape=(2,))
    with pytest.raises(EngineError, match=r"step: sizes depend on the numbers in n; build this engine"):
        plan_file(graph, small_order(inputs=(*small_order().inputs, n)), tmp_path)


def test_another_signature_is_refused(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    other = Tensor(name="z", dtype="float32", shape=("B", 4))
    with pytest.raises(EngineError, match=r"the network has \['y'\] where \['z'\] were asked for"):
        plan_file(graph, small_order(outputs=(other,)), tmp_path)


BUILDER_IN_A_CYCLE = """
import gc
import sys
from pathlib import Path
from mc_export.lower import tensorrt
from mc_export.lower.onnx import OnnxFile
from tests.export.test_tensorrt import small_order

make_log = tensorrt.make_log


def collecting_log(trt):
    log = make_log(trt)

    class Log(type(log)):
        def log(self, severity, message):
            gc.collect(0)

    return Log()


tensorrt.make_log = collecting_log
folder = Path(sys.argv[1])
library = tensorrt.TRT_LIBRARIES["tensorrt-rtx"].load()
log = make_log(library)
gc.disable()
cycle = [library.Builder(log)]
cycle.append(cycle)
del cycle
tensorrt.plan_file(OnnxFile.at(folder / "step.onnx"), small_order(), folder)
"""


def test_a_builder_that_an_error_left_behind_does_not_block_the_next_one(tmp_path: Path) -> None:
    """Collected while the library logs, it would wait for the lock that this holds; so all of it is in a process that can be
    ended."""
    graph_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    command = [sys.executable, "-c", BUILDER_IN_A_CYCLE, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    assert (tmp_path / "step.engine").stat().st_size > 0


class _Stop(BaseException):
    """An interruption, as Ctrl-C is one."""


def test_what_progress_raises_stops_the_library(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    told: list[float] = []

    def stop(share: float) -> None:
        told.append(share)
        raise _Stop

    with pytest.raises(_Stop):
        plan_file(graph, small_order(tick=stop), tmp_path)
    assert len(told) == 1
    assert not (tmp_path / "step.engine").exists()
    files, _ = plan_file(graph, small_order(), tmp_path)  # and the library can be asked again
    assert files[0].stat().st_size > 0


def test_a_library_from_before_streams_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))
    (streamed,), options = plan_file(graph, small_order(), tmp_path)
    size = streamed.stat().st_size
    assert options["gpu_bytes"] == size
    monkeypatch.delattr(trt.Builder, "build_serialized_network_to_stream")
    (whole,), options = plan_file(graph, small_order(), tmp_path)
    assert options["gpu_bytes"] == whole.stat().st_size == size


def test_a_disk_that_is_full_is_said_and_leaves_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"], name="product"))

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def open_full(path: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        file = opened(path, mode, *arguments, **keywords)
        if path.suffix != ".engine":
            return file
        file.close()
        return Full()

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match="No space left on device"):
        plan_file(graph, small_order(), tmp_path)
    assert not (tmp_path / "step.engine").exists()


def test_compute_capabilities_are_named() -> None:
    assert capabilities_for("tensorrt-rtx") == DEFAULT_CAPABILITIES
    assert capabilities_for("tensorrt-rtx", ("12.0", "8.9", "12.0")) == ("12.0", "8.9")
    with pytest.raises(RequestError, match=r"--compute-capability 9\.0: tensorrt-rtx builds for .*8\.9.*12\.0"):
        capabilities_for("tensorrt-rtx", ("8.9", "9.0"))
    assert plan_facts("tensorrt-rtx", ("8.9",)) == {"version": trt.__version__, "capabilities": ("8.9",)}
    for wrong in ("8,9", "sm89", "8", ""):
        with pytest.raises(RequestError, match=r"expected one such as 8\.9"):
            BuildOptions(compute_capabilities=(wrong,))


def test_a_library_that_is_missing_is_said_with_its_install() -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed")
    with pytest.raises(EngineError, match=r"tensorrt: tensorrt is not installed; pip install 'mc-runtime\[tensorrt\]'"):
        plan_facts("tensorrt", ())


def test_a_fallback_runs_on_a_cpu() -> None:
    assert BuildOptions(fallback=EngineChoice("openvino", Precision.INT8)).fallback is not None
    with pytest.raises(RequestError, match="fallback tensorrt-rtx: needs a GPU itself; choose onnxruntime or openvino"):
        BuildOptions(fallback=EngineChoice("tensorrt-rtx", Precision.BF16))
