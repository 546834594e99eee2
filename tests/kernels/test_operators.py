"""The operators where there is no GPU: eager, compiled and exported on CPU tensors, and what the launchers refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mc_kernels.canvas_inject import (
    canvas_inject,
    canvas_inject_fp8,
    canvas_inject_fp8_reference,
    canvas_inject_reference,
    canvas_inject_triton,
)
from mc_kernels.canvas_injection_attention import canvas_injection_attention, canvas_injection_attention_reference
from mc_kernels.checks import next_power_of_two, split_width
from mc_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_reference, gated_residual_norm_triton
from mc_kernels.glumb_depthwise import glumb_depthwise, glumb_depthwise_reference, glumb_depthwise_triton
from mc_kernels.guided_step import guided_step, guided_step_reference, guided_step_triton
from mc_kernels.launch import recorded
from mc_kernels.linear_attention import linear_attention, linear_attention_reference, linear_attention_triton
from mc_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference, qk_norm_rope_triton

BFLOAT16 = torch.bfloat16


def draw(*shape: int, seed: int = 30, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def injection(dtype: torch.dtype) -> tuple[Tensor, ...]:
    modulation = draw(2, 1, 2, 64, seed=31, dtype=dtype).expand(2, 3, 2, 64)
    return draw(2, 3, 4, 5, 64, dtype=dtype), draw(2, 2, 2, 3, 64, dtype=dtype), modulation[:, :, 0], modulation[:, :, 1]


def residual(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return draw(2, 7, 40, dtype=dtype), draw(2, 7, 40, dtype=dtype), *draw(3, 2, 1, 40, dtype=dtype).unbind(0)


def projections(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return draw(2, 9, 3, 2, 32, dtype=dtype).unbind(2)


def feed_forward(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return draw(2, 3, 4, 20, dtype=dtype), draw(9, 20), draw(20, dtype=dtype)


def step(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return draw(2, 2, 4, 5, dtype=dtype), draw(2, 2), draw(2, 5), draw(2, 4, 5), draw(2, 2, 4, 5)


def clip_step(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return draw(2, 2, 4, 3, 5, 6, dtype=dtype), draw(2, 2, 3), draw(2, 3), draw(2, 4, 3, 5, 6)


def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, k, _ = projections(dtype)
    return q, k, draw(32, dtype=dtype), draw(32, dtype=dtype), draw(9, 32)[:, ::2], draw(9, 32, seed=33)[:, ::2]


OPERATORS: list[tuple[Any, Callable[..., Any], Callable[[torch.dtype], tuple[Tensor, ...]]]] = [
    (canvas_inject, canvas_inject_reference, injection),
    (canvas_inject_fp8, canvas_inject_fp8_reference, injection),
    (linear_attention, linear_attention_reference, projections),
    (gated_residual_norm, gated_residual_norm_reference, residual),
    (glumb_depthwise, glumb_depthwise_reference, feed_forward),
    (guided_step, guided_step_reference, step),
    (guided_step, guided_step_reference, clip_step),
    (qk_norm_rope, qk_norm_rope_reference, heads),
    (
        canvas_injection_attention,
        canvas_injection_attention_reference,
        lambda dtype: (*injection(dtype), draw(192, 64, dtype=dtype), draw(192, dtype=dtype)),
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize(("operator", "reference", "inputs"), OPERATORS, ids=[entry[1].__name__ for entry in OPERATORS])
def test_cpu_tensors_run_the_reference(operator: Any, reference: Any, inputs: Any, dtype: torch.dtype) -> None:
    arguments = inputs(dtype)
    torch.testing.assert_close(operator(*arguments), reference(*arguments), rtol=0, atol=0)
    # The schema, the fake's shapes and dtypes against the real ones, and tracing with dynamic shapes.
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


class InjectAndAttend(nn.Module):
    """Operators in a row, as an engine holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(draw(192, 64) / 8)

    def forward(self, x: Tensor, canvas: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        h, attended = canvas_injection_attention(x, canvas, shift, scale, self.qkv)
        frames = (tensor.flatten(0, 1).flatten(1, 2) for tensor in (h, attended))
        return gated_residual_norm(*frames, None, *(tensor.flatten(0, 1)[:, None] for tensor in (shift, scale)))


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = InjectAndAttend()
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*injection(torch.float32)), module(*injection(torch.float32)))


def test_exported_with_dynamic_sizes() -> None:
    module = InjectAndAttend()
    b, height, width = (torch.export.Dim(name, min=1, max=64) for name in "BHW")
    shapes = ({0: b, 2: height, 3: width}, {0: b}, {0: b}, {0: b})
    program = torch.export.export(module, injection(torch.float32), dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"mc_kernels.canvas_injection_attention.default", "mc_kernels.gated_residual_norm.default"} <= targets
    other = (draw(1, 3, 6, 2, 64), draw(1, 2, 2, 3, 64), draw(1, 3, 64), draw(1, 3, 64))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*other), module(*other))


def meta(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, CANVAS, ROW = meta(2, 3, 4, 5, 64), meta(2, 2, 2, 3, 64), meta(2, 3, 64)
TOKENS, MODULATION = meta(2, 9, 64), meta(2, 1, 64)
SCALARS = meta(2, 3, dtype=torch.float32)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: canvas_inject_triton(X, CANVAS[0], ROW, ROW), r"canvas_inject: canvas is .* reshape it to \[B=2, t, h, w, D=64\]"),
    (lambda: canvas_inject_triton(X, meta(3, 2, 2, 3, 64), ROW, ROW), r"canvas is \[3, .* must be \[B=2, t, h, w, D=64\]"),
    (lambda: canvas_inject_triton(X, CANVAS, ROW[:, :2], ROW), r"shift is .* must be \[B=2, T=3, D=64\]"),
    (lambda: canvas_inject_triton(X.transpose(2, 3), CANVAS, ROW, ROW), r"x has strides .* call \.contiguous\(\)"),
    (lambda: canvas_inject_triton(X, CANVAS, meta(2, 64, 3).mT, ROW), r"shift has strides .* call \.contiguous\(\)"),
    (
        lambda: canvas_inject_triton(X.double(), CANVAS, ROW, ROW),
        r"x is .* float64; convert it with \.to\(\) to one of: float32",
    ),
    (lambda: canvas_inject_triton(X, CANVAS, torch.zeros(2, 3, 64), ROW), r"shift is on cpu; move it to meta"),
    (lambda: canvas_inject_triton(X[:0], CANVAS[:0], ROW[:0], ROW[:0]), r"x is .* empty; skip the call"),
    (lambda: linear_attention_triton(*meta(2, 9, 3, 4, 64).unbind(2)), r"q is .* must be \[B, N, heads, 32\]"),
    (
        lambda: linear_attention_triton(meta(2, 9, 4, 32), meta(2, 9, 4, 32).half(), meta(2, 9, 4, 32)),
        "k is .* one of: bfloat16",
    ),
    (
        lambda: linear_attention_triton(*meta(2, 9, 3, 4, 32).unbind(2), splits=10),
        "splits is 10; pass a number from 1 to the 9",
    ),
    (
        lambda: gated_residual_norm_triton(TOKENS, TOKENS[:, :8], None, MODULATION, MODULATION),
        r"y is .* must be \[B=2, N=9, D=64\]",
    ),
    (
        lambda: gated_residual_norm_triton(TOKENS, TOKENS, None, MODULATION[:, 0], MODULATION),
        r"shift is .* reshape it to \[B=2, 1",
    ),
    (lambda: glumb_depthwise_triton(meta(1, 4, 4, 6), meta(9, 6), meta(6)), "taps is .* one of: float32"),
    (lambda: glumb_depthwise_triton(meta(1, 4, 4, 7), meta(9, 7, dtype=torch.float32), meta(7)), "needs a value and a gate"),
    (lambda: guided_step_triton(meta(2, 3, 4), SCALARS, SCALARS, meta(2, 4), meta(2, 2, 4)), "order 1 needs 0 remembered"),
    (
        lambda: guided_step_triton(meta(2, 3, 4), meta(2, 3, 4, dtype=torch.float32), SCALARS, meta(2, 4)),
        r"a weight for each frame and sample is \[2, 4\] bfloat16; pass a clip",
    ),
    (
        lambda: guided_step_triton(meta(2, 3, 4), SCALARS, meta(2, 11, dtype=torch.float32), meta(2, 4)),
        "of order 5; pass 1 to 4",
    ),
    (
        lambda: qk_norm_rope_triton(*meta(2, 9, 3, 2, 7).unbind(2)[:2], meta(7), meta(7), SCALARS, SCALARS),
        "heads are 7 wide; .* pass an even width",
    ),
    (
        lambda: qk_norm_rope_triton(*meta(2, 9, 3, 2, 8).unbind(2)[:2], meta(16), meta(8), SCALARS, SCALARS),
        r"k_weight is .* must be \[16\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_launchers_refuse_with_the_mend(call: Callable[[], object], message: str) -> None:
    with recorded() as launches, pytest.raises(ValueError, match=message):
        call()
    assert not launches


def test_cpu_tensors_are_not_launched() -> None:
    with pytest.raises(ValueError, match="tensors are on cpu; move them to a CUDA device, or call the reference"):
        linear_attention_triton(*projections(torch.float32))


def test_grids_stay_within_cudas_limits() -> None:
    channels = 2 * 256 * 65536
    with recorded(), pytest.raises(ValueError, match="65536 programs on grid axis 1, at most 65535; split the batch"):
        glumb_depthwise_triton(meta(1, 1, 1, channels), meta(9, channels, dtype=torch.float32), meta(channels))


@pytest.mark.parametrize(
    ("width", "blocks"), [(1, (1, 1)), (2, (1, 1)), (24, (16, 8)), (63, (32, 32)), (2240, (2048, 256)), (3072, (2048, 1024))]
)
def test_two_blocks_cover_a_width(width: int, blocks: tuple[int, int]) -> None:
    assert split_width(width) == blocks
    assert sum(blocks) >= width
    assert all(block == next_power_of_two(block) for block in blocks)


def test_without_triton_references_run_and_kernels_say_what_to_install() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from mc_kernels.launch import launch
from mc_kernels.linear_attention import linear_attention, one_pass_kernel
print(linear_attention(*torch.zeros(3, 1, 2, 1, 32)).shape)
try:
    launch(one_pass_kernel, (1,), torch.zeros(1))
except RuntimeError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root / "kernels", capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one_pass_kernel needs Triton: `pip install triton`, or pass CPU tensors to run the reference" in done.stdout


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    script = "import sys, mc_kernels; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root / "kernels", timeout=120, check=False).returncode == 0
