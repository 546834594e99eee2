"""Opens a checkpoint: a local folder or a hub id, stock diffusers or MetaCanvas."""

from __future__ import annotations

from pathlib import Path

from mc_export.backbones.base import Backbone
from mc_export.backbones.registry import BACKBONES, backbone_of
from mc_export.checkpoint import layout
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.source import local_folder, read_json
from mc_export.model.config import METACANVAS_FILE, MetaCanvasConfig, load_config
from mc_runtime.errors import CheckpointError


def load_checkpoint(source: str | Path) -> Checkpoint:
    """Opens a checkpoint and checks that its parts are there.

    Args:
        source: a folder, or a hub id such as ``owner/name`` (fetched: safetensors, configurations and tokenizers only).

    Raises:
        CheckpointError: it is not there, incomplete, or of a kind that is not supported; the message says what to do.
    """
    path = local_folder(source)
    index_file = path / layout.MODEL_INDEX
    if not index_file.is_file():
        raise CheckpointError(f"{path}: no {layout.MODEL_INDEX}; expected a diffusers pipeline folder")
    raw = read_json(index_file)
    index = {
        name: (value[0], value[1])
        for name, value in raw.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[0] and value[1]
    }
    pipeline = str(raw.get("_class_name"))
    backbones = [found for _, class_name in index.values() if (found := backbone_of(class_name, pipeline))]
    if not backbones:
        known = ", ".join(_described(backbone) for backbone in BACKBONES)
        raise CheckpointError(
            f"{index_file}: no supported backbone among {sorted(index)} of {pipeline}; supported classes: {known}"
        )
    options = {name: value for name, value in raw.items() if not name.startswith("_") and name not in index}
    checkpoint = Checkpoint(path, index, backbones[0], _metacanvas(path), options)
    _check_parts(checkpoint)
    return checkpoint


def _described(backbone: Backbone) -> str:
    """The classes of a backbone, and the pipelines they must be of."""
    classes = ", ".join(backbone.model_classes)
    return f"{classes} (of {' or '.join(backbone.pipelines)})" if backbone.pipelines else classes


def _metacanvas(path: Path) -> MetaCanvasConfig | None:
    """``metacanvas.json``, or None where there is none."""
    file = path / METACANVAS_FILE
    if file.is_symlink() and not file.exists():
        raise CheckpointError(f"{file}: a link to nothing; copy the checkpoint again")
    try:
        return load_config(path)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error


def _check_parts(checkpoint: Checkpoint) -> None:
    """Every folder and file the checkpoint's kind needs is there, and every model's configuration is one."""
    needed = [
        f"{checkpoint.backbone.component}/config.json",
        f"{layout.VAE}/config.json",
        f"{layout.SCHEDULER}/scheduler_config.json",
    ]
    if checkpoint.conditioning == "text_encoder":
        for encoder in checkpoint.backbone.encoders:
            needed += [f"{encoder.model}/config.json", f"{encoder.tokenizer}/tokenizer_config.json"]
    if checkpoint.conditioning == "image_encoder":
        needed += [f"{checkpoint.backbone.image_encoder}/config.json", f"{layout.FEATURE_EXTRACTOR}/{layout.IMAGE_SETTINGS}"]
    if not checkpoint.is_stock:
        needed += [f"{layout.PLANNER}/config.json", f"{layout.PROCESSOR}/tokenizer_config.json", layout.CANVAS_WEIGHTS]
    for name in (checkpoint.backbone.component, layout.VAE, layout.SCHEDULER):
        if name not in checkpoint.index:
            raise CheckpointError(f"{checkpoint.path}/{layout.MODEL_INDEX}: names no {name!r} component")
    for name, reason in checkpoint.backbone.unsupported_components.items():
        if name in checkpoint.index:
            raise CheckpointError(f"{checkpoint.path}/{layout.MODEL_INDEX}: has a {name!r}: {reason}")
    for part in needed:
        if not (checkpoint.path / part).is_file():
            raise CheckpointError(f"{checkpoint.path}: {part} is missing (see docs/checkpoint.md)")
        if part.endswith("/config.json"):
            checkpoint.component_config(part.partition("/")[0])
    for task in checkpoint.config.tasks if checkpoint.config else ():
        if refusal := checkpoint.backbone.task_refusal(checkpoint.model_config, task):
            raise CheckpointError(f"{checkpoint.path}/{METACANVAS_FILE}: tasks: {refusal}")
