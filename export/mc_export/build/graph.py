"""The ONNX graph of a program: from the cache, or exported into it, or, where it is large, into a scratch folder."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mc_export.build.cache import build_entry, lookup
from mc_export.build.options import BY_LAYER, EngineChoice
from mc_export.build.progress import State
from mc_export.lower.onnx import BF16_OPSET, OPSET, OnnxFile, onnx_from_program
from mc_export.lower.tensorrt import builds_plans
from mc_export.program.base import Program
from mc_export.program.export import export_program
from mc_runtime.bundle.manifest import Precision

# Graphs up to this many bytes of weights are kept too, so that another target or precision needs no new export.
_KEPT_BYTES = 1 << 29


def graph_of(choice: EngineChoice) -> str:
    """What the graph of an engine depends on besides its program: one serves all targets that take float32."""
    lowered = builds_plans(choice.target) and choice.precision in (Precision.FP16, Precision.BF16, *BY_LAYER)
    return f"{choice.precision} {BF16_OPSET}" if lowered else str(OPSET)


def cached_graph(program: Program, scratch: Path, enter: Callable[[State], None], key: str) -> OnnxFile:
    """The graph of `program`, in whatever its weights are in.

    Args:
        program: what to export.
        scratch: where a large graph goes.
        enter: told of every state.
        key: content key of the graph; empty to export it anew whatever the cache has.

    Raises:
        EngineError: it cannot be exported.
    """
    name = f"{program.component}.onnx"
    opset = BF16_OPSET if any(weight.dtype == torch.bfloat16 for weight in program.parameters()) else OPSET

    def export(directory: Path) -> dict[str, Any]:
        enter(State.EXPORTING)
        exported = export_program(program)
        enter(State.LOWERING)
        onnx_from_program(exported, program.inputs, program.outputs, directory / name, opset=opset)
        return {}

    if not key or sum(weight.nbytes for weight in program.parameters()) > _KEPT_BYTES:
        export(scratch)
        gc.collect()  # the export holds the weights in a cycle
        return OnnxFile.at(scratch / name)
    entry = lookup(key) or build_entry(key, export)
    return OnnxFile.at(entry.directory / name)
