"""The bundles that are timed: one checkpoint built in several ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mc_export.build import BuildOptions, BuildReport, EngineChoice, build_bundle
from mc_runtime.bundle.manifest import Component, Precision

FP32, BF16, INT8 = Precision.FP32, Precision.BF16, Precision.INT8

#: Name to target, precision, and components that differ from it.
VARIANTS: dict[str, tuple[str, Precision, dict[Component, EngineChoice]]] = {
    "onnxruntime fp32": ("onnxruntime", FP32, {}),
    "onnxruntime int8": ("onnxruntime", INT8, {}),
    "openvino fp32": ("openvino", FP32, {}),
    "openvino bf16": ("openvino", BF16, {}),
    "openvino int8": ("openvino", INT8, {}),
    "inductor fp32": ("inductor", FP32, {}),
    "inductor bf16": ("inductor", BF16, {}),
    "openvino mixed": ("openvino", INT8, {"vae_decoder": EngineChoice("openvino", BF16)}),
    "openvino int8 step": ("openvino", BF16, {"step": EngineChoice("openvino", INT8)}),
}
#: What the backbones beside SANA are timed with.
SUBJECT_VARIANTS = ("openvino bf16", "openvino int8 step", "openvino int8")
QUICK = ("onnxruntime fp32", "openvino bf16")


def variant_folder(name: str, checkpoint: Path, work: Path) -> Path:
    """Where a variant's bundle is kept."""
    return work / "bundles" / f"{checkpoint.name}-{name.replace(' ', '-')}"


def build_variant(name: str, checkpoint: Path, work: Path, on_progress: Callable[[str], None]) -> BuildReport:
    """Build a variant into `work`, or find it there unchanged. Raises what `build_bundle` raises."""
    target, precision, engines = VARIANTS[name]
    options = BuildOptions(target=target, precision=precision, engines=engines, max_batch=1)
    folder = variant_folder(name, checkpoint, work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return build_bundle(checkpoint, folder, options, lambda event: on_progress(f"{name}: {event}"))
