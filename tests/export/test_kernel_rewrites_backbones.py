"""Every backbone's step by `mc_kernels`: the same numbers, every block matched. On a CPU the operators run their references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mc_export.lower.bf16 import compute_in_bf16
from mc_export.program.export import export_program, quick_tracing
from mc_export.rewrites.counts import Counts, check_operators
from mc_export.rewrites.kernels import use_kernels
from mc_kernels.launch import traced
from mc_runtime.errors import EngineError
from tests.export.test_kernel_rewrites import CountOperators
from tests.tiny_flux import tiny_flux
from tests.tiny_steps import KINDS, sizes_for, tiny_step
from tests.tiny_wan import tiny_wan

CONNECTOR = {"canvas_injection_attention": 1, "glumb_depthwise": 1, "gated_residual_norm": 1, "guided_step": 1}
# Of two double and two single blocks of FLUX; of two of Wan's.
FLUX = {"gated_residual_norm": 2 * 3 + 1, "qk_norm_rope": 2 * 2 + 2}
WAN = {"gated_residual_norm": 2 * 3 - 1, "qk_norm_rope": 2}
OWN: dict[str, Counts] = {"flux": FLUX, "flux-kontext": FLUX, "wan": WAN, "wan-clips": WAN}
CASES = [("flux", False, 1), ("flux-kontext", True, 2), ("wan", False, 3), ("wan-clips", True, 2), ("sdxl", True, 1),
         ("animatediff", False, 1), ("svd", True, 2)]  # fmt: skip


def expected_counts(name: str, canvas: bool) -> Counts:
    counts = dict(CONNECTOR) if canvas else {"guided_step": 1}
    for operator, count in OWN.get(name, {}).items():
        counts[operator] = counts.get(operator, 0) + count
    return counts


@pytest.mark.parametrize(("name", "canvas", "order"), CASES)
def test_the_rewritten_step_gives_the_same_numbers(name: str, canvas: bool, order: int) -> None:
    plain, rewritten = (tiny_step(name, canvas=canvas, order=order) for _ in range(2))
    counts = use_kernels(rewritten)
    assert counts == expected_counts(name, canvas)
    for seed, large in enumerate((False, True)):
        inputs = plain.example(sizes_for(plain, large), seed=seed)
        with CountOperators() as counted:
            results = rewritten.run(inputs)
        assert dict(counted.found) == counts
        for output, expected in plain.run(inputs).items():
            torch.testing.assert_close(results[output], expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["flux-kontext", "wan-clips"])
def test_the_kernels_take_bf16(name: str) -> None:
    """No further from float32 than the plain step in bf16 is; angles and guidance stay in float32."""
    plain, lowered, by_kernels = (tiny_step(name) for _ in range(3))
    use_kernels(by_kernels)
    inputs = plain.example(sizes_for(plain, True), seed=4)
    inputs["coefficients"] = torch.tensor([[1.0, 0.0, 1.0]]).expand(3, -1)  # the prediction is the result
    exact = plain.run(inputs)["next_sample"]
    errors = [
        float((compute_in_bf16(step).run(inputs)["next_sample"] - exact).norm() / exact.norm())
        for step in (lowered, by_kernels)
    ]
    assert 1e-4 < errors[1] < 1.2 * errors[0] < 5e-2


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


@pytest.mark.parametrize(("name", "model", "order"), [
    pytest.param("flux", tiny_flux(5, num_layers=1, num_single_layers=1, guidance_embeds=False), 1, marks=pytest.mark.matrix),
    ("wan", tiny_wan(6, num_layers=1), 2),
])  # fmt: skip
def test_the_export_has_every_operator_and_a_compiler_sees_their_kernels(
    name: str, model: Any, order: int, hopper: None
) -> None:
    """One launch for each of these operators, with all sizes still symbolic."""
    program = tiny_step(name, canvas=False, order=order, model=model)
    counts = use_kernels(program)
    exported = export_program(program)
    check_operators(exported, "step", counts)
    with traced(), quick_tracing():
        seen = exported.run_decompositions({})
    kernels = [node for node in seen.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    assert len(kernels) == sum(counts.values())
    assert not [node for node in seen.graph.nodes if str(node.target).startswith("mc_kernels")]
    assert all(not isinstance(node.kwargs["grid"][0][0], int) for node in kernels)


def replace_last(blocks: nn.ModuleList) -> None:
    blocks[len(blocks) - 1] = nn.Identity()


def drop_last(blocks: nn.ModuleList) -> None:
    del blocks[len(blocks) - 1]


@pytest.mark.parametrize(("change", "message"), [
    (replace_last, "1 of the backbone's 2 blocks are .*, which kernels replace, and 1 are something else"),
    (drop_last, "1 of the backbone's 2 blocks are .*, which kernels replace, and 0 are"),
])  # fmt: skip
@pytest.mark.parametrize(("name", "blocks"), [
    ("sana", "transformer_blocks"), ("flux", "transformer_blocks"), ("flux", "single_transformer_blocks"), ("wan", "blocks"),
])  # fmt: skip
def test_a_block_that_is_not_matched_is_an_error(name: str, blocks: str, change: Any, message: str) -> None:
    step = tiny_step(name, canvas=False)
    change(getattr(step.backbone.model, blocks))
    with pytest.raises(EngineError, match=message) as caught:
        use_kernels(step)
    assert "\n" not in str(caught.value)


def test_wan_without_its_norm_before_cross_attention_is_an_error() -> None:
    step = tiny_step("wan", canvas=False, model=tiny_wan(3, cross_attn_norm=False))
    with pytest.raises(EngineError, match="no kernel is written for Wan without a norm before cross-attention; build it for"):
        use_kernels(step)


def test_every_kind_is_here() -> None:
    assert {"sana", *(name for name, _, _ in CASES)} == set(KINDS)
