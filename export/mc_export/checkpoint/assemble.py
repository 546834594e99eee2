"""Makes a MetaCanvas checkpoint out of a planner, a stock pipeline and canvas weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from mc_export.checkpoint import layout
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.components import load_canvas_weights, save_canvas_weights
from mc_export.checkpoint.load import load_checkpoint
from mc_export.checkpoint.source import local_folder, read_json
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import METACANVAS_FILE, CanvasConfig, MetaCanvasConfig, load_config, save_config
from mc_runtime.bundle.atomic import staged_directory
from mc_runtime.errors import CheckpointError

_PROCESSOR_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip
_PLANNER_PATTERNS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def default_config(pipeline: Checkpoint, conditioning: str = "planner") -> MetaCanvasConfig:
    """A canvas token per latent token at the pipeline's own resolution, as the paper has for SANA (section 3.3); of a UNet,
    per cell of its coarsest level."""
    height, width = pipeline.backbone.default_latent_size(pipeline.model_config)
    cells = pipeline.backbone.size_multiple(pipeline.model_config)
    keyframes = 3 if "T" in pipeline.backbone.latent_axes else 1  # Table 6
    grid = (keyframes, height // cells, width // cells)
    canvas = CanvasConfig(grid=grid, pixels_per_token=pipeline.pixels_per_latent * cells)
    return MetaCanvasConfig.model_validate({"conditioning": conditioning, "canvas": canvas.model_dump()})


def assemble_checkpoint(
    out: Path,
    *,
    planner: str | Path,
    pipeline: str | Path,
    canvas: Path | None = None,
    config: Path | None = None,
    lora: Path | None = None,
    conditioning: str = "planner",
    seed: int = 0,
) -> Checkpoint:
    """Writes a MetaCanvas checkpoint; it appears whole or not at all.

    Args:
        out: the folder to make.
        planner: a Qwen2.5-VL folder or hub id, with its processor's files in it.
        pipeline: a stock diffusers pipeline, folder or hub id.
        canvas: ``canvas.safetensors``; without it the connectors are fresh: their last projections are zero, so pictures stay
            those of the backbone until it is trained.
        config: ``metacanvas.json``; without it :func:`default_config`.
        lora: a PEFT folder for the planner.
        conditioning: ``planner`` or ``text_encoder``; only without ``config``.
        seed: of the fresh weights.

    Raises:
        CheckpointError: a part is missing or does not fit the others.
    """
    stock = load_checkpoint(pipeline)
    planner_folder = local_folder(planner)
    _check_planner(planner_folder)
    settings = default_config(stock, conditioning) if config is None else load_config(config.parent, config.name)
    if settings is None:
        raise CheckpointError(f"{config}: no such file")
    with staged_directory(out, marker=METACANVAS_FILE) as stage:
        _copy_pipeline(stock, stage, keep_text_encoder=settings.conditioning == "text_encoder")
        _copy(planner_folder, stage / layout.PLANNER, _PLANNER_PATTERNS)
        _copy(planner_folder, stage / layout.PROCESSOR, _PROCESSOR_FILES)
        if lora is not None:
            _copy(lora, stage / layout.PLANNER_LORA, ("adapter_config.json", "adapter_model.safetensors"))
        save_config(settings, stage)
        _write_canvas(stage, stock, settings, canvas, seed)
        load_checkpoint(stage).load_canvas()
    return load_checkpoint(out)


def _check_planner(folder: Path) -> None:
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "qwen2_5_vl":
        raise CheckpointError(f"{folder}/config.json: model_type is {kind!r}; the planner must be a qwen2_5_vl")
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"{folder}: tokenizer_config.json is missing; the planner's folder must hold its processor's files"
        )


def _copy_pipeline(stock: Checkpoint, stage: Path, *, keep_text_encoder: bool) -> None:
    """The pipeline's folders and its index, without the text encoder where the planner takes its place."""
    encoders = () if keep_text_encoder else stock.backbone.encoders
    dropped = {folder for encoder in encoders for folder in (encoder.model, encoder.tokenizer)}
    dropped |= {stock.backbone.image_encoder, layout.FEATURE_EXTRACTOR} if stock.backbone.image_encoder else set()
    index = read_json(stock.path / layout.MODEL_INDEX)
    for name in stock.index:
        if name in dropped:
            del index[name]
        else:
            _copy(stock.path / name, stage / name, layout.HUB_PATTERNS)
    (stage / layout.MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_canvas(stage: Path, stock: Checkpoint, settings: MetaCanvasConfig, weights: Path | None, seed: int) -> None:
    planner_config = read_json(stage / layout.PLANNER / "config.json")
    planner_dim = planner_config.get("text_config", planner_config)["hidden_size"]
    torch.manual_seed(seed)
    canvas = CanvasModel(settings, planner_dim, *stock.canvas_widths)
    if weights is not None:
        load_canvas_weights(canvas, weights)
    save_canvas_weights(canvas, stage / layout.CANVAS_WEIGHTS)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    files = sorted({file for pattern in patterns for file in source.glob(pattern) if file.is_file()})
    if not files:
        raise CheckpointError(f"{source}: holds none of {', '.join(patterns[:3])}")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
