"""What the GPU's measuring script makes of its results: kinds of kernels, bars, lines and documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.bars import BARS, Bar, verdicts
from benchmarks.gpu.profile import IDLE, OTHER, kind_of
from benchmarks.gpu.sections import EAGER

pytestmark = pytest.mark.integration


def test_kernels_are_told_apart_by_name() -> None:
    found = {
        "void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_TNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32": "matrix products",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16": "convolutions",
        "gated_residual_norm_kernel_0": "our kernels",
        "triton_red_fused_add_mul_native_layer_norm_3": "compiled by inductor",
        "triton_poi_fused__scaled_dot_product_flash_attention_addmm_1": "compiled by inductor",
        "Memcpy HtoD (Pageable -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernel>": OTHER,
    }
    assert {name: kind_of(name) for name in found} == found
    assert IDLE not in found.values()


def test_a_step_that_could_not_be_captured_is_shown_as_such() -> None:
    part = measured()["sana"]["package, graph"] | {"without_graph": "stream is capturing"}
    assert "stream is capturing" in report.line_of("sana", "package, graph", part)
    assert report._way_row("package, graph", part)[0] == "package, graph (NOT CAPTURED: stream is capturing)"


def measured() -> dict[str, Any]:
    """Sections as a run on a card leaves them."""

    def way(total: float, idle: float, **over: float) -> dict[str, Any]:
        return {
            "ours": bool(over), "variant": "bf16", "error": 0.01, "idle_between_steps": idle if over else None,
            "peak_bytes": 9 << 30, "seconds": {name: {"median": total} for name in ("denoise", "total")},
            "breakdown": {"matrix products": 0.1, IDLE: 0.0},
            **{f"over torch {name} bf16": value for name, value in over.items()},
        }  # fmt: skip

    kernel = {
        "error": 1e-3, "seconds": {"ours": 1e-5}, "bytes_per_second": 3.4e12, "share_of_copy_of_same_size": 0.93,
        "over": {"eager": 3.0},
    }  # fmt: skip
    return {
        "card": {"card": {"name": "NVIDIA H200", "triton": "3.6.0"}, "gemm fp8": {"failed": "no e4m3"}},
        "kernels": {"a": kernel | {"share_of_copy": 0.9}, "b": kernel | {"share_of_copy": 0.7}, "c": {"failed": "so it is"}},
        "sana": {EAGER: way(1.2, 0.3), "package, graph": way(0.45, 0.002, eager=2.6, compile=1.2),
                 "kernels, graph": way(0.39, 0.02, eager=3.0, compile=1.4), "ended": {"why": "late", "notes": []}},
    }  # fmt: skip


def test_bars_take_the_worst_kernel_and_the_best_way() -> None:
    rows = dict(zip(BARS, verdicts(measured()), strict=True))
    found = {bar.what.split(",")[0] + str(bar.variant): (row["verdict"], row["found"]) for bar, row in rows.items()}
    assert found["memory-bound kernelsNone"] == ("missed", 0.7)
    sana = [row for bar, row in rows.items() if bar.sections == ("sana",)]
    assert [(row["verdict"], row["found"]) for row in sana[:3]] == [("met", 0.39), ("met", 3.0), ("met", 1.4)]
    assert sana[3]["verdict"] == "not measured"  # FP8
    idle = next(row for row in rows.values() if "waits" in row["what"])
    assert (idle["verdict"], idle["where"]) == ("missed", "sana: kernels, graph")
    assert Bar("x", ("sana",), ("nothing",), at_least=1).verdict(measured())["verdict"] == "not measured"


def test_documents_are_made_from_the_results(tmp_path: Path) -> None:
    empty = report.docs_text([])
    assert empty.count(report.NOT_ON_A_GPU) == len(BARS) + 1
    text = report.docs_text([{"sections": measured(), "date": "2026-11-21T00:00:00", "dry_run": False}])
    assert "### NVIDIA H200, 2026-11-21" in text
    assert "0.39, met (sana: kernels, graph)" in text
    assert "| a | 1.0e-03 | 10.0 | 3400 | 90.0 % | 93.0 % | 3.00 |  |" in text
    assert "images/" not in text  # there is no chart
    around = report.docs_with(f"before\n{report._BEGIN}\nold\n{report._END}\nafter", [])
    assert around == f"before\n{report._BEGIN}\n{empty}\n{report._END}\nafter"


def test_the_documents_show_the_results_that_are_there() -> None:
    text = report.DOCS.read_text(encoding="utf-8")
    assert report.docs_with(text, report.saved_reports()) == text
