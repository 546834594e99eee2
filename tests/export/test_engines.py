"""Every engine of every target equals its torch module, at sizes it was not exported at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mc_export.build.verify import verify_engine
from mc_export.lower import lower
from mc_runtime.bundle.manifest import Engine, Precision, Tensor
from mc_runtime.errors import EngineError
from tests.export.conftest import Exported

COMPONENTS = [
    ("metacanvas", "planner"),
    ("metacanvas", "step"),
    ("metacanvas", "vae_decoder"),
    ("metacanvas", "vae_encoder"),
    ("stock", "text_encoder"),
    ("stock", "step"),
]
# Sizes of the dynamic dimensions: odd, batch 1 and 3, one guidance branch and two, one row of text.
SHAPES = [
    {"B": 1, "G": 1, "L": 1, "S": 1, "H": 2, "W": 3, "h": 1, "w": 2},
    {"B": 3, "G": 2, "L": 31, "S": 13, "H": 9, "W": 7, "h": 5, "w": 7},
    {"B": 1, "G": 2, "L": 12, "S": 12, "H": 8, "W": 8, "h": 4, "w": 4},
]
Export = Callable[[str, str], Exported]


def feeds_of(program, shapes=SHAPES) -> list[dict[str, torch.Tensor]]:
    """Inputs at SHAPES; picture sizes in pixels follow the latent ones."""
    return [
        program.example({name: axis.multiple * shape[name.upper() if name in "hw" and axis.multiple > 1 else name]
                         for name, axis in program.axes.items()}, seed=seed)
        for seed, shape in enumerate(shapes)
    ]  # fmt: skip


def engine_of(case: Exported, target: str, precision: Precision, folder: Path) -> tuple[Engine, list[Path]]:
    files, options = lower(target, case.onnx, case.program.component, precision, [], folder)
    program = case.program
    spec = Engine(
        target=target, precision=precision, files=tuple(file.name for file in files),
        inputs=program.inputs, outputs=program.outputs, options=options,
    )  # fmt: skip
    return spec, files


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision", "tolerance"), [
    ("onnxruntime", Precision.FP32, 2e-5), ("openvino", Precision.FP32, 2e-5), ("openvino", Precision.BF16, 2e-2),
])  # fmt: skip
@pytest.mark.parametrize(("checkpoint", "component"), COMPONENTS)
def test_engine_equals_its_module(
    exported: Export, checkpoint: str, component: str, target: str, precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    case = exported(checkpoint, component)
    spec, files = engine_of(case, target, precision, tmp_path)
    error = verify_engine(case.program, spec, files, feeds_of(case.program), tolerance=tolerance)
    assert len(error.shapes) == len(SHAPES)
    assert error.relative_l2 > 0 or component == "planner", "an exact match of floats means that nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "component"), COMPONENTS)
def test_graph_has_the_signature(exported: Export, checkpoint: str, component: str) -> None:
    case = exported(checkpoint, component)
    graph = onnx.load(case.onnx.path).graph
    for specs, values in ((case.program.inputs, graph.input), (case.program.outputs, graph.output)):
        found = [
            (value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)) for value in values
        ]
        assert found == [(spec.name, spec.shape) for spec in specs]


@pytest.mark.slow
def test_nothing_of_the_step_depends_on_the_request_alone(exported: Export) -> None:
    """Two blocks and the connector: the products of a step, and none of the context's projections or norms."""
    operators = exported("metacanvas", "step").onnx.operators()
    blocks = 2
    # A block: q, k, v, out, k^T v, q (k^T v), q sum(k) of the linear attention; q, out, scores, values of the cross-attention.
    # The connector: the former 7, its projection, the 2 products of the canvas's interpolation, for a picture has rows and
    # columns and no frames. The model's last projection.
    assert operators["MatMul"] == blocks * (7 + 4) + 7 + 1 + 2 + 1
    assert operators["Gemm"] == 2 * 3, "timestep embeddings of backbone and connector"
    assert operators["LayerNormalization"] == 2 * blocks + 2 + 1
    assert operators["Softmax"] == blocks
    assert operators["Sin"] == operators["Cos"] == 1, "backbone and connector share their timestep's sinusoids"


@pytest.mark.slow
def test_weights_can_lie_beside_the_graph(exported: Export, tmp_path: Path) -> None:
    from mc_export.lower.onnx import onnx_from_program
    from mc_export.program.export import export_program

    program = exported("metacanvas", "vae_decoder").program
    path = tmp_path / "vae_decoder.onnx"
    graph = onnx_from_program(export_program(program), program.inputs, program.outputs, path, external_data_threshold=1000)
    assert [file.name for file in graph.files] == ["vae_decoder.onnx", "vae_decoder.onnx.data"]
    weights = sum(weight.nbytes for weight in program.vae.decoder.parameters())
    assert graph.files[1].stat().st_size > 0.9 * weights
    assert graph.path.stat().st_size < 0.5 * graph.files[1].stat().st_size + 100_000
    for target in ("onnxruntime", "openvino"):
        folder = tmp_path / target
        folder.mkdir()
        spec, files = engine_of(Exported(program, graph), target, Precision.FP32, folder)
        assert len(files) == 2
        verify_engine(program, spec, files, feeds_of(program))


def test_no_rule_goes_through_the_graph_at_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser's rule of several results would: its time grows with the square of the operators."""
    from onnxscript.rewriter import rules
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    from mc_export.lower.onnx import onnx_from_program

    one_by_one = SimplePatternMatcher.match
    asked = []

    def match(self: SimplePatternMatcher, *args: Any, **kwargs: Any) -> Any:
        assert self.pattern.has_single_output_node
        asked.append(self)
        return one_by_one(self, *args, **kwargs)

    monkeypatch.setattr(SimplePatternMatcher, "match", match)
    program = torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.zeros(2, 4),))
    ends = [(Tensor(name=name, dtype="float32", shape=(2, 4)),) for name in ("x", "y")]
    onnx_from_program(program, *ends, tmp_path / "linear.onnx")
    assert asked, "the optimiser has other matchers now; look at what they cost"
    assert "try_rewrite" not in vars(rules.common.slice_split_rule), "whoever else exports has all rules"


@pytest.mark.slow
def test_an_engine_beyond_its_tolerance_is_refused(exported: Export, tmp_path: Path) -> None:
    case = exported("metacanvas", "vae_decoder")
    spec, files = engine_of(case, "openvino", Precision.BF16, tmp_path)
    with pytest.raises(EngineError, match=r"vae_decoder: openvino bf16 is off by .* more than 1e-06.*fp32") as caught:
        verify_engine(case.program, spec, files, feeds_of(case.program), tolerance=1e-6)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_an_engine_that_is_not_finite_is_refused(exported: Export, tmp_path: Path) -> None:
    case = exported("metacanvas", "vae_decoder")
    broken = onnx.load(case.onnx.path)
    weight = max(broken.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = b"\xff" * len(weight.raw_data)
    onnx.save(broken, tmp_path / "vae_decoder.onnx")
    spec, _ = engine_of(case, "openvino", Precision.FP32, tmp_path)
    spec = Engine(**{**vars(spec), "target": "onnxruntime"})
    with pytest.raises(EngineError, match="not finite"):
        verify_engine(case.program, spec, [tmp_path / "vae_decoder.onnx"], feeds_of(case.program))
