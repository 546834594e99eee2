"""A step in two parts is the step; with a kept residual it is what diffusers' First Block Cache makes of the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor

from mc_export.backbones.registry import BACKBONES
from mc_export.checkpoint import load_checkpoint
from mc_export.model.injection import CanvasBackbone
from mc_export.program.cut_step import FirstStepProgram, RestStepProgram
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_export.quantize.calibration import calibration_inputs
from mc_export.quantize.cut_step import cut_step_inputs
from mc_runtime.errors import CheckpointError
from tests.factories import tiny_metacanvas_checkpoint, tiny_sana
from tests.tiny_steps import KINDS, sizes_for, tiny_connector, tiny_step

CUT = ("sana", "flux", "flux-kontext", "wan", "wan-clips")

# diffusers lists no SANA block among those its hooks know; what it returns is all that they ask.
TransformerBlockRegistry.register(SanaTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class Parts:
    """Both parts of a tiny step, run one behind the other."""

    def __init__(self, name: str, canvas: bool = True) -> None:
        self.first = tiny_step(name, canvas=canvas, order=2, program=FirstStepProgram)
        self.rest = tiny_step(name, canvas=False, order=2, program=RestStepProgram)

    def __call__(self, inputs: dict[str, Tensor], kept: dict[str, Tensor] | None, keep: list[float]) -> dict[str, Tensor]:
        """The outputs of both, those of the rest where both have them; `kept` as an earlier call's outputs."""
        zeros = {spec.name: spec for spec in self.first.inputs}["kept_change"]
        batch, branches = inputs["guidance"].shape
        extents = inputs["sample"].shape[2:]
        sizes = {"B": batch, "G": branches, **dict(zip("THW"[-len(extents) :], extents, strict=True))}
        blank = torch.zeros([size if isinstance(size, int) else sizes[size] for size in zeros.shape])
        before = kept or {"next_change": blank, "next_residual": blank}
        state = {"kept_change": before["next_change"], "kept_residual": before["next_residual"]}
        given = inputs | state
        first = self.first.run({spec.name: given[spec.name] for spec in self.first.inputs})
        given |= first | {"keep": torch.tensor(keep)}
        return first | self.rest.run({spec.name: given[spec.name] for spec in self.rest.inputs})


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("large", [False, True])
def test_both_parts_are_the_step(name: str, large: bool) -> None:
    step, parts = tiny_step(name, order=2), Parts(name)
    inputs = step.example(sizes_for(step, large), seed=3)
    expected = step.run(inputs)
    found = parts(inputs, None, [0.0] * len(inputs["sample"]))
    for output, tensor in expected.items():
        assert (found[output] - tensor).abs().max() < 1e-5 * max(1, tensor.abs().max()), output


@pytest.mark.parametrize("name", CUT)
def test_samples_keep_what_is_theirs_whatever_their_neighbours_do(name: str) -> None:
    parts = Parts(name)
    inputs = parts.first.example({**sizes_for(parts.first, large=True), "B": 3}, seed=4)
    kept = parts(inputs, None, [0.0] * 3)
    inputs["sample"] = inputs["sample"] + 0.1
    together = parts(inputs, kept, [0.0, 1.0, 0.0])
    for row, keep in enumerate((0.0, 1.0, 0.0)):
        of_row = {output: tensor[row : row + 1] for output, tensor in kept.items()}
        alone = parts({name: tensor[row : row + 1] for name, tensor in inputs.items()}, of_row, [keep])
        for output, tensor in alone.items():
            assert (together[output][row : row + 1] - tensor).abs().max() < 2e-5 * max(1, tensor.abs().max()), output
    ends = parts.first.run({**inputs, "kept_change": kept["next_change"], "kept_residual": kept["next_residual"]})
    assert torch.equal(together["next_residual"][1], kept["next_residual"][1])
    assert (together["next_sample"][1] - ends["next_sample"][1]).abs().max() < 1e-5
    assert not torch.equal(together["next_residual"][0], kept["next_residual"][0])


@pytest.mark.parametrize("name", CUT)
def test_the_test_sees_a_canvas_that_changes(name: str) -> None:
    parts = Parts(name)
    inputs = parts.first.example({**sizes_for(parts.first, large=True), "B": 2}, seed=4)
    kept = parts(inputs, None, [0.0, 0.0])
    assert parts(inputs, kept, [1.0, 1.0])["difference"].max() < 1e-5
    inputs["canvas"][1, 0] = -inputs["canvas"][1, 0]  # of one sample and one of its branches
    difference = parts(inputs, kept, [1.0, 1.0])["difference"]
    assert difference[0] < 1e-5
    assert difference[1] > 0.03


@pytest.mark.parametrize("name", ["sana", *(pytest.param(name, marks=pytest.mark.matrix) for name in CUT[1:])])
@pytest.mark.parametrize("part", [FirstStepProgram, RestStepProgram])
def test_parts_export_with_all_their_sizes_dynamic(name: str, part: type[StepProgram]) -> None:
    program = tiny_step(name, canvas=part is FirstStepProgram, program=part)
    exported = export_program(program)
    used = {node.name for node in exported.graph.nodes if node.op == "placeholder" and node.users}
    assert {spec.name for spec in program.inputs} <= used, "some libraries drop an input that nothing reads"


def test_what_cannot_be_cut_says_why() -> None:
    for name in ("sdxl", "animatediff", "svd"):
        with pytest.raises(ValueError, match="skips"):
            tiny_step(name, program=FirstStepProgram)
    assert all(backbone.stream is not None or backbone.uncut for backbone in BACKBONES)
    with pytest.raises(CheckpointError, match="one block"):
        tiny_step("sana", model=tiny_sana(9, num_layers=1), program=FirstStepProgram)
    with pytest.raises(ValueError, match="without its connector"):
        tiny_step("sana", program=RestStepProgram)


@pytest.mark.parametrize(
    ("name", "canvas"), [(name, True) for name in CUT] + [("sana", False), ("flux", False), ("wan", False)]
)
def test_kept_residuals_give_what_diffusers_first_block_cache_gives(name: str, canvas: bool) -> None:
    """Without a canvas the two tests of change are one and decide alike; with one ours sees more, and both keep everything."""
    parts = Parts(name, canvas)
    published = Published(name, canvas)
    threshold = 0.08 if not canvas else float("inf")
    apply_first_block_cache(published.model, FirstBlockCacheConfig(threshold))
    kept: dict[str, Tensor] | None = None
    decisions = []
    for inputs, given in published.requests():
        differs = parts(inputs, kept, [0.0])["difference"].item() >= threshold
        keep = kept is not None and not differs
        decisions.append(keep)
        kept = parts(inputs, kept, [float(keep)])
        with CacheMixin.cache_context(published.model, "request"):
            expected = published(**given)
        assert (kept["next_sample"] - expected).abs().max() < 2e-5 * max(1, expected.abs().max())
    assert decisions == ([False, True, True, True, True] if canvas else [False, True, False, False, True])


class Published:
    """A tiny backbone as diffusers has it, and five requests of a step: the sample moves a little, much, much and a little."""

    def __init__(self, name: str, canvas: bool) -> None:
        step = tiny_step(name, canvas=canvas, order=2)
        self.step, kind = step, KINDS[name]
        self.model = kind.model(9)
        connector = tiny_connector(kind, self.model) if canvas else None
        self.prepare = kind.backbone.context_preparation(self.model)
        self.wide = kind.backbone.context_width(self.model.config)
        self.backbone = CanvasBackbone(kind.backbone, self.model, connector).eval()

    def requests(self) -> Any:
        inputs = self.step.example({**sizes_for(self.step, large=False), "B": 1, "G": 1}, seed=5)
        context = torch.randn(1, inputs["context"].shape[2], self.wide, generator=torch.Generator().manual_seed(7))
        with torch.inference_mode():
            inputs["context"] = self.prepare(context)[:, None]
        inputs["coefficients"], inputs["guidance"] = torch.tensor([[1.0, 0, 0, 1, 0]]), torch.ones_like(inputs["guidance"])
        inputs["history"] = torch.zeros_like(inputs["history"])
        constant = {c.name: inputs[c.name][:, 0] if c.per_branch else inputs[c.name] for c in self.step.conditions}
        if "canvas" in inputs:
            constant["canvas"] = inputs["canvas"][:, 0]
        for index, moved in enumerate((0.0, 0.002, 3.0, 3.0, 0.002)):
            generator = torch.Generator().manual_seed(20 + index)
            inputs["sample"] = inputs["sample"] + moved * torch.randn(inputs["sample"].shape, generator=generator)
            inputs["timestep"] = torch.tensor([600.0 - index])
            told = {"sample": inputs["sample"], "timestep": inputs["timestep"], "context_mask": inputs["context_mask"][:, 0]}
            yield dict(inputs), {**told, **constant, "context": context}

    def __call__(self, **given: Tensor) -> Tensor:
        with torch.no_grad():
            return self.backbone(**given)


def test_parts_are_calibrated_on_what_they_are_given(tmp_path: Path) -> None:
    """Which is such that both end as the whole step does."""
    checkpoint = load_checkpoint(tiny_metacanvas_checkpoint(tmp_path / "checkpoint", seed=11))
    steps = calibration_inputs(checkpoint, "step")[:3]
    width = checkpoint.backbone.prepared_context_width(checkpoint.model_config)

    def program(kind: type[StepProgram]) -> StepProgram:
        canvas = None if kind is RestStepProgram else checkpoint.load_canvas()
        return kind(checkpoint.load_backbone(canvas), width, order=steps[0]["coefficients"].shape[1] // 2).eval()

    def run(kind: type[StepProgram], feed: dict[str, Any]) -> dict[str, Tensor]:
        return program(kind).run({name: torch.from_numpy(array) for name, array in feed.items()})

    for kind in (FirstStepProgram, RestStepProgram):
        for feed, step in zip(cut_step_inputs(checkpoint, steps, kind.component), steps, strict=True):
            assert set(feed) == {spec.name for spec in program(kind).inputs}
            found, whole = run(kind, feed), run(StepProgram, step)
            assert (found["next_sample"] - whole["next_sample"]).abs().max() < 1e-5
            if kind is FirstStepProgram:
                assert abs(found["difference"].item() - 2) < 1e-5
            else:
                assert (found["next_residual"] - torch.from_numpy(feed["kept_residual"])).abs().max() < 1e-5
