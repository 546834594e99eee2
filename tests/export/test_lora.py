"""Programs that take LoRAs: without one they are the plain program to the bit, with one they have its weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from mc_export.backbones.fused import FusedLinear
from mc_export.build.options import EngineChoice
from mc_export.build.plan import PlanWishes, make_plan
from mc_export.lora import AdaptedProgram
from mc_export.lora.layers import AdaptedLinear, adaptable_layers
from mc_export.lower.bf16 import compute_in
from mc_export.program.base import Program
from mc_runtime.bundle.engines import lora_inputs
from mc_runtime.bundle.manifest import Precision
from tests.factories import tiny_sana
from tests.tiny_steps import KINDS, sizes_for, tiny_step

RANK = 3


def without(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same inputs with an adapter of zeros."""
    return {name: torch.zeros_like(tensor) if name.startswith("lora_") else tensor for name, tensor in inputs.items()}


def plain(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("lora_")}


def merged(program: Program, adapted: AdaptedProgram, inputs: dict[str, torch.Tensor]) -> Program:
    """`program` with the adapter's `B A` added to its weights."""
    deltas: dict[str, torch.Tensor] = {}
    for group, (down, up) in zip(adapted.groups, lora_inputs(adapted.groups), strict=True):
        deltas |= {name: inputs[up][index] @ inputs[down][index] for index, name in enumerate(group.layers)}
    for layer in adaptable_layers(program, program.adaptable):
        linear = program.get_submodule(layer.path)
        linear.weight.data += torch.cat([deltas.pop(name) for name in layer.names])
    assert not deltas
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_with_adapters(name: str, dtype: torch.dtype) -> None:
    program = tiny_step(name).eval()
    adapted = AdaptedProgram(deepcopy(program), RANK).eval()
    inputs = adapted.example(sizes_for(program, large=True), seed=4)
    if dtype is torch.float32:
        expected = merged(deepcopy(program), adapted, inputs).run(plain(inputs))
        found = adapted.run(inputs)
        for output, tensor in expected.items():
            torch.testing.assert_close(found[output], tensor, rtol=1e-4, atol=1e-4)
    else:
        program, adapted = compute_in(program, dtype), compute_in(adapted, dtype)
    expected, found, changed = program.run(plain(inputs)), adapted.run(without(inputs)), adapted.run(inputs)
    for output, tensor in expected.items():
        assert torch.equal(found[output], tensor), "an adapter of zeros changes no bit"
        assert not torch.equal(changed[output], tensor)


def test_a_plan_lists_the_layers_that_take_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    made: list[AdaptedProgram] = []

    def make() -> AdaptedProgram:
        made.append(AdaptedProgram(tiny_step("sana", model=tiny_sana(seed=9, num_layers=1)), RANK).eval())
        return made[-1]

    spec = make_plan(
        make, EngineChoice("tensorrt-rtx", Precision.BF16), tmp_path, PlanWishes({"B": 1, "G": 2}, capabilities=("8.9",)),
        enter=lambda state: None, tick=lambda share: None, calibrate=lambda component: [],
    )  # fmt: skip
    assert spec.lora == made[0].groups
    assert spec.lora
    assert [tensor.name for tensor in spec.inputs][-2:] == list(lora_inputs(spec.lora)[-1])
    assert spec.error is not None
    assert 0 < spec.error.relative_l2 < 5e-2


def test_every_linear_layer_of_the_blocks_takes_one() -> None:
    adapted = AdaptedProgram(tiny_step("sana"), RANK)
    inside = [module for module in adapted.modules() if isinstance(module, AdaptedLinear)]
    assert len(inside) == sum(len(group.layers) for group in adapted.groups)
    names = {name for group in adapted.groups for name in group.layers}
    assert "transformer.transformer_blocks.0.attn1.to_q" in names
    assert all(name.startswith("transformer.") for name in names)


def test_layers_of_one_input_are_one_product() -> None:
    torch.manual_seed(6)
    layers = {"a": nn.Linear(5, 3), "b": nn.Linear(5, 4)}
    fused = FusedLinear(layers)
    x = torch.randn(2, 5)
    torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in layers.values()], dim=-1))
    assert fused.sources == {"a": 3, "b": 4}
