"""Rewrites count what they matched, and whoever runs one compares."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.export import ExportedProgram

from mc_runtime.errors import EngineError

Counts = dict[str, int]
"""Operator of `mc_kernels` to how often it has to occur in a program."""

_FP8 = frozenset({"fp8_linear", "fp8_product"})
_FAULT = "this is a fault of the exporter; report it"


def check_blocks(blocks: Iterable[nn.Module], kind: type[nn.Module], expected: int) -> None:
    """Raises EngineError unless the backbone has as many blocks as its configuration says, all of the kind that is replaced."""
    listed = list(blocks)
    matched = sum(isinstance(block, kind) for block in listed)
    if matched != expected or len(listed) != expected:
        raise EngineError(
            f"step: {matched} of the backbone's {expected} blocks are {kind.__name__}s, which kernels replace, and "
            f"{len(listed) - matched} are something else; {_FAULT}"
        )


def check_operators(exported: ExportedProgram, component: str, expected: Counts, fp8_layers: int = 0) -> None:
    """Raises EngineError unless every operator occurs in the program as often as the rewrites said.

    Products in FP8 are at least as many as there are layers in FP8, and none where there are none.
    """
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    ours = [name.removeprefix("mc_kernels.").partition(".")[0] for name in names if name.startswith("mc_kernels.")]
    # A layer in FP8 may be called more than once; that none is lost, their caller knows by their number.
    in_fp8 = sum(name in _FP8 for name in ours)
    found = {name: ours.count(name) for name in sorted(set(ours) - _FP8)}
    wanted = {name: count for name, count in sorted(expected.items()) if count}
    if in_fp8 < fp8_layers or (in_fp8 and not fp8_layers):
        raise EngineError(f"{component}: the export has {in_fp8} products in fp8 where {fp8_layers} belong; {_FAULT}")
    if found != wanted:
        raise EngineError(f"{component}: the export has {found} of the kernels' operators where {wanted} belong; {_FAULT}")
