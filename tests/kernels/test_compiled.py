"""The kernels as machine code, for GPUs that are not there: no spills, wide loads, and the committed table is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mc_kernels.aot.cases import CAPABILITIES, CASES
from mc_kernels.aot.compiler import Compiled, compile_launch, signature_from_launch
from mc_kernels.aot.report import Row, committed_table, rows_for_capability, table_from_rows, with_table
from mc_kernels.canvas_inject import canvas_inject_triton
from mc_kernels.gated_residual_norm import gated_residual_norm_triton
from mc_kernels.glumb_depthwise import glumb_depthwise_triton
from mc_kernels.guided_step import guided_step_triton
from mc_kernels.launch import recorded
from mc_kernels.linear_attention import linear_attention_triton
from mc_kernels.qk_norm_rope import qk_norm_rope_triton

DOCUMENT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
# Threads of this kernel keep two channels each, 32 bits in bfloat16 and 64 for its float32 taps: docs/kernels.md says why.
NARROW = {"glumb_depthwise": 64}


@pytest.fixture(autouse=True)
def compile_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run's machine code must not stand in for what Triton makes now."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_committed_table_is_what_compiles_now(capability: int) -> None:
    rows = rows_for_capability(capability)
    for row in rows:
        assert row.compiled.spilled_bytes == 0, f"{row.kernel} ({row.case}) spills on sm_{capability}"
        assert max(row.compiled.load_bits) == NARROW.get(row.kernel, 128), f"{row.kernel} ({row.case}) on sm_{capability}"
    assert len({row.kernel for row in rows}) == 8
    assert table_from_rows(rows) == committed_table(DOCUMENT, capability), "run: python -m mc_kernels.aot docs/kernels.md"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def inject(size: tuple[int, int, int], grid: tuple[int, int, int], width: int) -> object:
    row = meta(1, size[0], width)
    return canvas_inject_triton(meta(1, *size, width), meta(1, *grid, width), row, row)


# What production in bfloat16 does not compile: float32 everywhere, equal and smaller grids, no gate, many branches, odd widths.
VARIANTS: dict[str, Callable[[], object]] = {
    "keyframes": lambda: inject((31, 22, 40), (3, 11, 20), 3072),
    "equal grids": lambda: inject((1, 16, 16), (1, 16, 16), 2240),
    "downsampling": lambda: inject((2, 3, 5), (3, 6, 17), 100),
    "one of everything": lambda: inject((1, 1, 1), (1, 1, 1), 1),
    "attention, split": lambda: linear_attention_triton(*meta(2, 1024, 3, 70, 32).unbind(2)),
    "attention, one pass": lambda: linear_attention_triton(*meta(62, 880, 3, 96, 32).unbind(2)),
    "no gate": lambda: gated_residual_norm_triton(meta(2, 63, 123), meta(2, 63, 123), None, meta(2, 1, 123), meta(2, 1, 123)),
    "feed-forward": lambda: glumb_depthwise_triton(meta(2, 32, 32, 11200), meta(9, 11200), meta(11200)),
    "a timestep for each token": lambda: gated_residual_norm_triton(*(meta(1, 27280, 3072) for _ in range(5))),
    "a weight for each frame": lambda: guided_step_triton(
        meta(2, 2, 4, 25, 72, 128), meta(2, 2, 25), meta(2, 3), meta(2, 4, 25, 72, 128)
    ),
    "order 4": lambda: guided_step_triton(meta(2, 4, 63), meta(2, 4), meta(2, 9), meta(2, 63), meta(2, 6, 63)),
    "all heads": lambda: qk_norm_rope_triton(
        *meta(2, 9, 3, 40, 128).unbind(2)[:2], *meta(2, 5120).unbind(0), *meta(2, 9, 64).unbind(0)
    ),
}


@pytest.mark.parametrize("capability", [min(CAPABILITIES), max(CAPABILITIES)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_compiles_without_spills(variant: str, capability: int) -> None:
    with recorded() as launches:
        VARIANTS[variant]()
    assert launches
    assert [compile_launch(launch, capability).spilled_bytes for launch in launches] == [0] * len(launches)


def test_spills_and_narrow_loads_would_show() -> None:
    """One kernel, starved of registers and of what is known about alignment: the two figures must move."""
    launch = CASES[0].launches()[0]
    types, constants, alignments = signature_from_launch(launch)
    assert types["x_ptr"] == "*bf16"
    assert types["stride"] == "i64"
    assert constants["T"] == 1
    assert alignments[(0,)] == [["tt.divisibility", 16]]
    starved = compile_launch(launch, 90, maxnreg=32)
    assert starved.spilled_bytes > 0
    unaligned = compile_launch(CASES[0].launches()[0], 90, aligned=False)
    assert max(unaligned.load_bits) == 16


def test_codes_are_divided_to_the_last_bit() -> None:
    """`/` is off by up to two in the last place on a GPU; Triton's interpreter does not show it."""
    (launch,) = next(case for case in CASES if case.name.endswith("e4m3 codes")).launches()
    types, constants, alignments = signature_from_launch(launch)
    source = ASTSource(launch.kernel, types, constexprs=constants, attrs=alignments)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.options["num_warps"]})
    threads = 32 * launch.options["num_warps"]
    assert kernel.asm["ptx"].count("div.rn.f32") == (constants["HEAD"] + constants["TAIL"]) // threads + 1


def test_a_table_goes_where_its_markers_are() -> None:
    rows = [Row("k", "case", Compiled(32, 0, 0, {128: 2, 32: 1}, {128: 1}))]
    document = "before\n<!-- sm_90 -->\nold\n<!-- end sm_90 -->\nafter\n"
    replaced = with_table(document, 90, table_from_rows(rows))
    assert committed_table(replaced, 90).endswith("| `k` | case | 32 | 0 | 0 | 2 x 128, 1 x 32 | 1 x 128 |\n")
    assert replaced.startswith("before\n")
    assert replaced.endswith("after\n")
    with pytest.raises(ValueError, match="no table between the markers"):
        with_table(document, 80, "")
