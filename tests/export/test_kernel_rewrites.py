"""SANA's blocks by `mc_kernels`: the same numbers, and every block matched; on a CPU the operators run their references."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mc_export.build.options import BuildOptions
from mc_export.build.parts import parts_of
from mc_export.checkpoint import Checkpoint
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.program.base import Program
from mc_export.rewrites.counts import check_operators
from mc_export.rewrites.kernels import use_kernels
from mc_kernels.linear_attention import linear_attention
from mc_runtime.errors import EngineError
from tests.export.conftest import LIMITS

# Two blocks of the tiny SANA's own, and the connector's, which the canvas enters.
EXPECTED = {
    "metacanvas": {
        "linear_attention": 2,
        "canvas_injection_attention": 1,
        "gated_residual_norm": 3,
        "glumb_depthwise": 3,
        "guided_step": 1,
    },
    "stock": {"linear_attention": 2, "gated_residual_norm": 2, "glumb_depthwise": 2, "guided_step": 1},
}
SIZES = [
    {"B": 1, "G": 1, "H": 2, "W": 3, "L": 1, "h": 1, "w": 2},
    {"B": 3, "G": 2, "H": 9, "W": 7, "L": 12, "h": 5, "w": 7},
]


def program_of(checkpoint: Checkpoint, component: str) -> Program:
    options = BuildOptions(engines={component: BuildOptions().choice(component)})
    return {part.component: part for part in parts_of(checkpoint, LIMITS, options)}[component].make()


class CountOperators(TorchDispatchMode):
    """Counts the operators of `mc_kernels` that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mc_kernels":
            self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_rewritten_step_gives_the_same_numbers(checkpoints: dict[str, Checkpoint], kind: str) -> None:
    published, rewritten = program_of(checkpoints[kind], "step"), program_of(checkpoints[kind], "step")
    assert use_kernels(rewritten) == EXPECTED[kind]
    for seed, sizes in enumerate(SIZES):
        inputs = published.example({name: sizes[name] for name in published.axes}, seed=seed)
        with CountOperators() as counted:
            results = rewritten.run(inputs)
        assert dict(counted.found) == EXPECTED[kind]
        for name, expected in published.run(inputs).items():
            torch.testing.assert_close(results[name], expected, rtol=1e-5, atol=2e-5)


def test_the_kernels_take_bf16(checkpoints: dict[str, Checkpoint]) -> None:
    published, lowered = program_of(checkpoints["metacanvas"], "step"), program_of(checkpoints["metacanvas"], "step")
    use_kernels(lowered)
    compute_in_bf16(lowered)
    taps = [buffer for name, buffer in lowered.named_buffers() if name.endswith("taps")]
    assert len(taps) == 3
    assert all(tap.dtype == torch.float32 for tap in taps)
    inputs = published.example(SIZES[1], seed=3)
    for name, expected in published.run(inputs).items():
        result = lowered.run(inputs)[name]
        assert result.dtype == torch.float32
        assert 0 < (result - expected).norm() / expected.norm() < 2e-2  # a bf16 step; measured 0.010


def test_a_program_without_such_blocks_is_left_alone(checkpoints: dict[str, Checkpoint]) -> None:
    decoder = program_of(checkpoints["stock"], "vae_decoder")
    before = [type(module) for module in decoder.modules()]
    assert use_kernels(decoder) == {}
    assert [type(module) for module in decoder.modules()] == before


@pytest.mark.parametrize("change", ["heads", "norm_q"])
def test_attention_that_no_kernel_is_written_for_is_an_error(checkpoints: dict[str, Checkpoint], change: str) -> None:
    step = program_of(checkpoints["stock"], "step")
    setattr(step.backbone.model.transformer_blocks[0].attn1, change, 4 if change == "heads" else nn.LayerNorm(64))
    with pytest.raises(EngineError, match="heads of 32 and no norms"):
        use_kernels(step)


class Attends(nn.Module):
    """One operator of ours among others'."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear_attention(states, states, states).sum(dim=2)


def test_an_export_that_lost_an_operator_is_an_error() -> None:
    exported = torch.export.export(Attends(), (torch.randn(1, 5, 2, 32),))
    check_operators(exported, "step", {"linear_attention": 1, "glumb_depthwise": 0})
    with pytest.raises(EngineError, match=r"step: the export has \{'linear_attention': 1\}.*\{'linear_attention': 2\}"):
        check_operators(exported, "step", {"linear_attention": 2})
