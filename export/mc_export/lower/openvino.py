"""Engine files for OpenVINO: its own format, with the islands that must stay in float32 marked."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openvino as ov

from mc_export.lower import Calibration
from mc_export.lower.onnx import OnnxFile
from mc_runtime.bundle.manifest import Precision

# Sinusoids of timesteps and positions: their arguments reach 1000, where bf16 is spaced 4 apart.
_PHASE_OPERATORS = frozenset({"Sin", "Cos"})
_SOURCES = frozenset({"Parameter", "Const"})
# OpenVINO's own attribute for "never convert this operator to a lower float", as it writes it to a file.
_KEEP = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:dynamic"}


def engine_files(
    onnx: OnnxFile, component: str, precision: Precision, calibration: Calibration, directory: Path
) -> tuple[list[Path], dict[str, Any]]:
    """See :func:`mc_export.lower.lower`."""
    model = ov.Core().read_model(str(onnx.path))  # weights stay memory-mapped
    options: dict[str, Any] = {}
    if precision is Precision.INT8:
        from mc_export.quantize import quantize_openvino

        with tempfile.TemporaryDirectory(dir=directory, prefix=".openvino-") as scratch:
            # Marked before it is quantized, so that what is measured there is what will run.
            xml, _ = save_openvino(model, Path(scratch) / f"{component}.xml")
            model, options = quantize_openvino(ov.Core().read_model(str(xml)), calibration, component)
            return save_openvino(model, directory / f"{component}.xml"), options
    return save_openvino(model, directory / f"{component}.xml"), options


def save_openvino(model: Any, xml: Path) -> list[Path]:
    """Writes a model's `.xml` and `.bin` with weights as they are, sizes dynamic, and sinusoids marked to stay in float32.

    One file serves every size: on OpenVINO's CPU plugin, fixed shapes were within 3 % of dynamic ones.
    """
    ov.save_model(model, str(xml), compress_to_fp16=False)
    tree = ET.parse(xml)
    keep_phases_in_float32(tree)
    tree.write(xml)
    return [xml, xml.with_suffix(".bin")]


def keep_phases_in_float32(tree: ET.ElementTree[Any]) -> int:
    """Marks every sine and cosine and all that their arguments are computed from; returns how many operators it marked.

    With the bf16 hint, OpenVINO would round the arguments too: SANA's error against float32 is then 0.041 instead of 0.007.
    """
    root = tree.getroot()
    layers = {layer.get("id"): layer for layer in root.iterfind("./layers/layer")}
    producers: dict[str | None, list[str | None]] = {}
    for edge in root.iterfind("./edges/edge"):
        producers.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    ancestors: set[str | None] = set()
    pending = [name for name, layer in layers.items() if layer.get("type") in _PHASE_OPERATORS]
    while pending:
        name = pending.pop()
        if name not in ancestors and layers[name].get("type") not in _SOURCES:
            ancestors.add(name)
            pending += producers.get(name, [])
    marked = [layers[name] for name in ancestors if _is_float(layers[name])]
    _mark(marked)
    return len(marked)


def _is_float(layer: ET.Element) -> bool:
    """Whether an operator gives floats; integers are never converted, and their passes break on the mark."""
    return any(port.get("precision") == "FP32" for port in layer.iterfind("./output/port"))


def _mark(layers: Iterable[ET.Element]) -> None:
    for layer in layers:
        info = layer.find("rt_info")
        if info is None:
            info = ET.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, info)
        if not any(attribute.get("name") == _KEEP["name"] for attribute in info):
            ET.SubElement(info, "attribute", dict(_KEEP))
