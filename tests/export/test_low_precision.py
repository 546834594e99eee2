"""Programs in 16 bits: near their float32 selves whatever a model does with what it is given, and exported with their types."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from mc_export.autoencoders.registry import vae_program
from mc_export.build.verify import measure
from mc_export.lower.bf16 import compute_in
from mc_export.program.base import Axis, Program, float_tensor
from mc_export.program.export import export_program
from mc_export.program.vision import VisionProgram
from tests.factories import tiny_planner, tiny_vae, tiny_wan_autoencoder

PROGRAMS: dict[str, Callable[[], Program]] = {
    "wan's decoder": lambda: vae_program("vae_decoder", tiny_wan_autoencoder("2.2", 1)),
    "wan's next decoder": lambda: vae_program("vae_decoder_next", tiny_wan_autoencoder("2.2", 1)),
    "wan's next encoder": lambda: vae_program("vae_encoder_next", tiny_wan_autoencoder("2.2", 1)),
    "dc-ae's decoder": lambda: vae_program("vae_decoder", tiny_vae(1)),
    "qwen's eyes": lambda: VisionProgram(tiny_planner(21).model.visual, max_tokens=64),
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 5e-2), pytest.param(torch.float16, 1e-2, marks=pytest.mark.matrix)]
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_stays_near_itself(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Caches that a model leaves in the list it is given are among the outputs."""
    program = PROGRAMS[name]().eval()
    lowered = compute_in(deepcopy(program), dtype)
    for seed, extents in enumerate(program.check_extents()):
        feed = program.example(extents, seed=seed)
        expected, found = program.run(feed), lowered.run(feed)
        for output, tensor in expected.items():
            assert found[output].dtype == torch.float32
            error = measure(found[output].numpy(), tensor.numpy(), output).relative_l2
            assert error <= tolerance, (output, error)
            assert error > 0 or "cache" in output


class _Joining(nn.Module):
    """Joins float32 to what it computes, as UNets do with the sinusoids of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(values), torch.ones(values.shape[0], 2)], dim=-1)


class _JoiningProgram(Program):
    component = "step"

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Joining()
        self.inputs, self.outputs = (float_tensor("x", "B", 4),), (float_tensor("y", "B", 6),)
        self.axes = {"B": Axis("B", 1, 8, 2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined: torch.Tensor = self.inner(x)
        return joined

    def example(self, extents, seed: int = 0):
        return {"x": torch.randn(extents["B"], 4, generator=torch.Generator().manual_seed(seed))}


def test_joins_of_two_types_are_cast_in_the_graph() -> None:
    exported = export_program(compute_in(_JoiningProgram(), torch.bfloat16))
    joins = [node for node in exported.graph.nodes if node.target == torch.ops.aten.cat.default]
    assert len(joins) == 1
    assert {part.meta["val"].dtype for part in joins[0].args[0]} == {torch.float32}
