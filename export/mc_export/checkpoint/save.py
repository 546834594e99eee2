"""Writes a MetaCanvas checkpoint: the pipeline's components, the planner, its processor and the canvas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from mc_export.checkpoint import layout
from mc_export.checkpoint.components import save_canvas_weights
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import MetaCanvasConfig, save_config


def save_checkpoint(
    folder: Path,
    config: MetaCanvasConfig,
    *,
    planner: nn.Module,
    processors: Sequence[Any],
    canvas: CanvasModel,
    components: dict[str, Any],
    pipeline_class: str,
) -> None:
    """Saves everything in ``folder`` with the libraries' own ``save_pretrained``.

    Args:
        folder: created; the caller stages it if it must appear at once.
        config: becomes ``metacanvas.json``.
        planner: the transformers Qwen2.5-VL model.
        processors: what makes up its processor, each with ``save_pretrained``: the tokenizer with its chat template, the image
            processor; or one whole ``Qwen2_5_VLProcessor``.
        canvas: canvas tokens and connectors.
        components: the diffusers pipeline's parts by name (``transformer``, ``vae``, ``scheduler``, ...).
        pipeline_class: what ``model_index.json`` names as the pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": pipeline_class, "_diffusers_version": diffusers.__version__}
    for name, component in components.items():
        component.save_pretrained(folder / name)
        library = type(component).__module__.split(".")[0]
        index[name] = [library, type(component).__name__]
    (folder / layout.MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    planner.save_pretrained(folder / layout.PLANNER)  # type: ignore[operator]  # nn.Module hides the method
    for processor in processors:
        processor.save_pretrained(folder / layout.PROCESSOR)
    save_canvas_weights(canvas, folder / layout.CANVAS_WEIGHTS)
    save_config(config, folder)
