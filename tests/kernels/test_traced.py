"""Operators as a compiler for CUDA sees them: their kernels in the graph, sizes still symbolic, outputs alone written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from mc_kernels.canvas_inject import columns_per_program
from mc_kernels.canvas_injection_attention import canvas_injection_attention
from mc_kernels.gated_residual_norm import gated_residual_norm, tokens_per_program
from mc_kernels.glumb_depthwise import glumb_depthwise, rows_per_program
from mc_kernels.launch import clamped, traced
from mc_kernels.linear_attention import linear_attention, token_splits

WIDTH = 64
OPERATORS = ("canvas_injection_attention", "linear_attention", "gated_residual_norm", "glumb_depthwise")
# What each kernel writes. `canvas_inject` and `linear_attention` together are the injection's launches.
WRITTEN = [
    {"h_ptr", "u_ptr"},  # canvas_inject
    {"partial_ptr"},  # linear attention of the injection: of symbolic sizes always in two launches
    {"o_ptr"},
    {"partial_ptr"},  # linear attention
    {"o_ptr"},
    {"out_ptr", "u_ptr"},  # gated_residual_norm
    {"o_ptr"},  # glumb_depthwise
]


class Block(nn.Module):
    """One of each operator, every result used."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH))
        self.taps, self.bias = nn.Parameter(torch.randn(9, 2 * WIDTH)), nn.Parameter(torch.randn(2 * WIDTH))

    def forward(self, x: Tensor, canvas: Tensor, modulation: Tensor) -> Tensor:
        b, _, h, w, d = x.shape
        shift, scale, gate = (modulation[:, index : index + 1] for index in range(3))
        hidden, attended = canvas_injection_attention(x, canvas, shift, scale, self.qkv)
        tokens = hidden.reshape(b, h * w, d)
        query, key, value = F.linear(attended.reshape(b, h * w, d), self.qkv).unflatten(-1, (3, -1, 32)).unbind(2)
        tokens, normed = gated_residual_norm(tokens, linear_attention(query, key, value).flatten(2), gate, shift, scale)
        picture = torch.cat([normed, normed], dim=-1).unflatten(1, (h, w))
        return tokens.unflatten(1, (h, w)) + glumb_depthwise(picture, self.taps, self.bias)


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    b, sides = Dim("B", min=1, max=8), [Dim(name, min=2, max=64) for name in "HWhw"]
    arguments = (torch.randn(2, 1, 6, 5, WIDTH), torch.randn(2, 1, 4, 3, WIDTH), torch.randn(2, 3, WIDTH))
    shapes = ({0: b, 2: sides[0], 3: sides[1]}, {0: b, 2: sides[2], 3: sides[3]}, {0: b})
    return export(Block(), arguments, dynamic_shapes=shapes)


@pytest.fixture
def hopper() -> Iterator[None]:
    """A driver that knows its target and nothing else: tracing asks for no more, and there is no GPU here."""
    driver = pytest.importorskip("triton").runtime.driver
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    yield
    driver._active = None


def operators_of(program: ExportedProgram) -> Counter[str]:
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return Counter(name for name in names if name.startswith(("mc_kernels", "triton_kernel")))


def test_an_operator_stays_whole_where_nobody_asks(exported: ExportedProgram) -> None:
    whole = Counter(f"mc_kernels.{name}.default" for name in OPERATORS)
    assert operators_of(exported) == whole
    assert operators_of(exported.run_decompositions({})) == whole


def test_a_compiler_sees_the_kernels(exported: ExportedProgram, hopper: None) -> None:
    with traced():
        seen = exported.run_decompositions({})
    assert operators_of(seen) == Counter(triton_kernel_wrapper_functional=len(WRITTEN))
    kernels = [node for node in seen.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    assert [set(node.kwargs["tensors_to_clone"]) for node in kernels] == WRITTEN
    assert all(not isinstance(node.kwargs["grid"][0][0], int) for node in kernels)  # it follows the sizes
    assert {(int(r.lower), int(r.upper)) for r in seen.range_constraints.values()} == {(1, 8), (2, 64)}
    assert len(seen.range_constraints) == 5
    assert operators_of(exported.run_decompositions({}))["mc_kernels.linear_attention.default"] == 1


def test_a_compiled_launch_follows_the_sizes_of_its_run(exported: ExportedProgram, hopper: None) -> None:
    """How far a program walks and into how many parts tokens are split: not what the small example of the trace would have."""
    with traced():
        seen = exported.run_decompositions({})
    symbols = dict(zip(("B", "H", "W"), (size.node.expr for size in seen_sizes(seen, (0, 2, 3))), strict=True))
    found: dict[str, list[int]] = {}
    for node in seen.graph.nodes:
        if str(node.target) == "triton_kernel_wrapper_functional":
            for name, value in node.kwargs["kwargs"].items():
                if name in ("columns_per_program", "tokens_per_program", "rows_per_program", "splits"):
                    expression = value.meta["val"].node.expr
                    size = expression.subs({symbols["B"]: 8, symbols["H"]: 64, symbols["W"]: 64})
                    found.setdefault(name, []).append(int(size))
    assert found == {
        "columns_per_program": [columns_per_program(8 * 64, 64)],
        "splits": [token_splits(8 * 2, 64 * 64)] * 4,  # two launches each of two attentions
        "tokens_per_program": [tokens_per_program(8, 64 * 64)],
        "rows_per_program": [rows_per_program(8 * 16, 64)],
    }
    assert found == {"columns_per_program": [16], "splits": [32] * 4, "tokens_per_program": [16], "rows_per_program": [8]}


def seen_sizes(program: ExportedProgram, dimensions: tuple[int, ...]) -> list[torch.SymInt]:
    """Of the first input."""
    first = next(spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == first)
    return [value.shape[dimension] for dimension in dimensions]


def test_bounds_of_sizes() -> None:
    assert [clamped(size, 1, 16) for size in (0, 5, 40)] == [1, 5, 16]
    assert clamped(9, 8, 5) == 8
