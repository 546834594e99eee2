"""ONNX from an exported program: the file that onnxruntime loads and that OpenVINO and TensorRT read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.rewriter.rules.common import slice_split_rule
from torch.export import ExportedProgram

from mc_export.lower import onnx_fp8, onnx_int4
from mc_export.program.export import quick_tracing
from mc_export.quiet import quiet
from mc_runtime.bundle.manifest import Tensor
from mc_runtime.errors import EngineError

# The newest set whose every operator onnxruntime's CPU provider and OpenVINO's reader run. From 23 on, attention is one
# operator, and onnxruntime 1.31 refuses its broadcast masks.
OPSET = 20
# The oldest set whose convolutions take bf16; TensorRT reads it.
BF16_OPSET = 22
# One protobuf file holds 2 GB; what comes near it goes beside it.
EXTERNAL_DATA_THRESHOLD = 3 << 29
# Smaller tensors stay in the graph even so: shapes and scalars that shape inference wants to see.
_INLINE_BYTES = 1024


@dataclass(frozen=True)
class OnnxFile:
    """A written graph: the file to load, and all its files."""

    path: Path
    files: tuple[Path, ...]

    @classmethod
    def at(cls, path: Path) -> OnnxFile:
        """The graph written at `path` before, with the weights beside it if it has them there."""
        data = _data_file(path)
        return cls(path, (path, data) if data.exists() else (path,))

    def operators(self) -> Counter[str]:
        """How often each operator occurs in it."""
        return Counter(node.op_type for node in onnx.load(self.path, load_external_data=False).graph.node)


def onnx_from_program(
    program: ExportedProgram,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    path: Path,
    *,
    external_data_threshold: int = EXTERNAL_DATA_THRESHOLD,
    opset: int = OPSET,
) -> OnnxFile:
    """Writes `program` as ONNX with the names and dynamic dimensions of `inputs` and `outputs`.

    Weights of `external_data_threshold` bytes or more in all go to one file beside it, `<name>.data`.

    Raises:
        EngineError: the program has an operator without an ONNX form, or the graph is not valid.
    """
    try:
        with quiet("torch.onnx"), quick_tracing(), _quick_rewriting():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                verbose=False,
                custom_translation_table=_translations(program),
            )
    except Exception as error:  # the exporter raises many types; each means the same here
        reason = " ".join(str(error).split())[:500]
        raise EngineError(f"{path.stem}: no ONNX form: {reason}") from error
    assert exported is not None
    model: ir.Model = exported.model
    _polish(model)
    onnx_int4.pack_codes(model)
    _name_dimensions(model, inputs, outputs)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if weights >= external_data_threshold:
        ir.save(model, path, external_data=_data_file(path).name, size_threshold_bytes=_INLINE_BYTES)
    else:
        ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=weights < EXTERNAL_DATA_THRESHOLD)
    return OnnxFile.at(path)


@contextmanager
def _quick_rewriting() -> Iterator[None]:
    """Leaves out the one of the optimiser's rules that looks for two operators, halves of one tensor.

    At every node it goes through all others, and no graph of ours has what it looks for: of 24 blocks of FLUX, 54 s of the
    102 that the graph takes.
    """
    slice_split_rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


def _translations(program: ExportedProgram) -> Any:
    """ONNX forms of our own operators, where the program has any."""
    names = [str(node.target) for node in program.graph.nodes]
    found: dict[Any, Any] = {}
    if any(name.startswith("mc_kernels.fp8") for name in names):
        found |= onnx_fp8.translations()
    if any(name.startswith("mc_kernels.int4") for name in names):
        found |= onnx_int4.translations()
    return found or None


def _data_file(path: Path) -> Path:
    return path.with_name(path.name + ".data")


def _polish(model: ir.Model) -> None:
    """Merges equal weights (the exporter's optimiser duplicates tied ones) and drops what only a debugger reads."""
    passes.DeduplicateInitializersPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _name_dimensions(model: ir.Model, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Gives inputs and outputs the signature's dimensions; shapes inside, in the exporter's own symbols, are dropped.

    onnxruntime and OpenVINO infer those again, and quantizers stumble over stale ones.
    """
    for specs, values in ((inputs, model.graph.inputs), (outputs, model.graph.outputs)):
        names = [value.name for value in values]
        if names != [spec.name for spec in specs]:
            raise EngineError(f"the graph has {names} where {[spec.name for spec in specs]} were asked for")
        for spec, value in zip(specs, values, strict=True):
            value.shape = ir.Shape(spec.shape)
    edges: set[Any] = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in edges:
                value.shape = None
