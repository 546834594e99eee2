"""How much memory a run takes, found on tensors without numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mc_export.lower.memory import peak_bytes, run_memory_of
from mc_export.program.base import Axis, Extents, Program, float_tensor
from mc_runtime.backends.packages import RunMemory
from tests.tiny_steps import tiny_step


class Toy(Program):
    """Inputs stay, a view is free, and what is not used any more does not count: `x` (8 wide), `h` and `sin(h)` (32 wide)."""

    component = "toy"
    inputs = (float_tensor("x", "B", "N", 8),)
    outputs = (float_tensor("y", "B", "N", 32),)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 32)
        self.axes = {axis.name: axis for axis in (Axis("B", 1, 4, 2), Axis("N", 2, 64, 6, 2))}

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        view = h.flatten(0, 1)
        y = h.sin()
        del h, view
        return y * 2

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        return {"x": torch.zeros(extents["B"], extents["N"], 8)}


@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (3, 10)])
def test_a_peak_is_what_is_alive_at_once(batch: int, tokens: int) -> None:
    assert peak_bytes(Toy(), {"B": batch, "N": tokens}) == 4 * batch * tokens * (8 + 32 + 32)


def test_it_is_taken_at_the_largest_sizes_of_one_picture() -> None:
    assert run_memory_of(Toy()) == {"bytes": 4 * 64 * 72, "at": {"B": 1, "N": 64}, "powers": {"B": 1.0, "N": 1.0}}


@pytest.mark.slow
def test_a_step_of_other_sizes_takes_about_what_the_powers_say() -> None:
    program = tiny_step("sana")
    memory = RunMemory(**run_memory_of(program))
    for sizes in ({"B": 1, "G": 1, "H": 8, "W": 12, "L": 32}, {"B": 4, "G": 2, "H": 16, "W": 10, "L": 5}):
        extents = {axis.name: axis.max for axis in program.axes.values()} | sizes
        found = peak_bytes(program, extents)
        assert 0.8 < memory.at_sizes(extents) / found < 1.25, extents
