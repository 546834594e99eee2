"""Makes the random-weight checkpoints that are timed, kept outside the repository.

    python -m benchmarks.checkpoints --size mid
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaPipeline

from benchmarks import mid, models
from mc_export.backbones.registry import backbone_of
from mc_export.checkpoint.save import save_checkpoint
from mc_export.model.canvas_connector import randomize_projections
from mc_export.model.canvas_model import CanvasModel
from mc_export.reference.prompts import chat_text
from mc_runtime.cache import cache_root

PLANNER_ROWS = 320
"""Rows of the planner's sequence in the *mid* size: the instruction's and the 256 of the canvas."""
_VERSION = 4  # of what this file writes; another number makes everything anew


def work_folder(work: Path | None) -> Path:
    """Where checkpoints and bundles of benchmarks are kept."""
    folder = work or cache_root() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def metacanvas_checkpoint(size: models.Size, work: Path, seed: int = 0) -> Path:
    """The MetaCanvas checkpoint of a size; made at first use."""
    return _made(work / f"{size.name}-metacanvas", lambda folder: _write_metacanvas(size, folder, seed))


def subject_checkpoint(subject: mid.Subject, work: Path, seed: int = 0) -> Path:
    """The MetaCanvas checkpoint of a backbone at mid size; made at first use."""
    return _made(work / f"mid-{subject.name}", lambda folder: _write_subject(subject, folder, seed))


def stock_checkpoint(size: models.Size, work: Path, seed: int = 0) -> Path:
    """The stock `SanaPipeline` of a size, with a Gemma 2 as wide as the planner; made at first use."""
    return _made(work / f"{size.name}-stock", lambda folder: _write_stock(size, folder, seed))


def long_prompt(size: models.Size, rows: int = PLANNER_ROWS) -> str:
    """A prompt that makes the planner see exactly `rows` rows, canvas and chat frame included."""
    tokenizer, _ = models.planner_processors()
    config = models.canvas_config(size)
    wanted = rows - size.canvas_cells**2
    words = models.WORDS.split()
    prompt = ""
    for index in range(4 * wanted):
        longer = f"{prompt} {words[index % len(words)]}".strip()
        length = len(tokenizer(chat_text(tokenizer, config, longer)).input_ids)
        if length > wanted:
            break
        prompt = longer
    for filler in ("", " !", " ! !", " ! ! !"):
        if len(tokenizer(chat_text(tokenizer, config, prompt + filler)).input_ids) == wanted:
            return prompt + filler
    raise ValueError(f"no prompt of {wanted} tokens")


def _made(folder: Path, write: Any) -> Path:
    """`folder`, written if it is not there or is of another version of this file."""
    stamp = folder / "benchmark.json"
    if stamp.is_file() and json.loads(stamp.read_text())["version"] == _VERSION:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = write(folder)
    stamp.write_text(json.dumps({"version": _VERSION, "parameters": found}, indent=2) + "\n")
    return folder


def _write_metacanvas(size: models.Size, folder: Path, seed: int) -> dict[str, int]:
    torch.set_default_dtype(size.dtype)  # the large ones are never held in float32
    try:
        planner = models.random_planner(size.planner, seed)
        backbone = models.random_backbone(size.backbone, seed + 1)
        autoencoder = models.random_autoencoder(size.autoencoder, seed + 2)
        canvas = models.random_canvas(size, seed + 3)
    finally:
        torch.set_default_dtype(torch.float32)
    save_checkpoint(
        folder, models.canvas_config(size), planner=planner, processors=models.planner_processors(), canvas=canvas,
        components={"transformer": backbone, "vae": autoencoder, "scheduler": models.scheduler()},
        pipeline_class="SanaPipeline",
    )  # fmt: skip
    parts = {"planner": planner, "backbone": backbone, "autoencoder": autoencoder, "canvas": canvas}
    return {name: models.parameters(part) for name, part in parts.items()}


def _write_subject(subject: mid.Subject, folder: Path, seed: int) -> dict[str, int]:
    parts = subject.parts(seed + 1)
    adapter = backbone_of(type(parts.backbone).__name__, subject.pipeline)
    assert adapter is not None
    config: Any = parts.backbone.config
    planner = models.random_planner(mid.PLANNER, seed)
    torch.manual_seed(seed + 3)
    canvas = CanvasModel(
        subject.config, mid.PLANNER.width, adapter.width(config), adapter.context_width(config), adapter.pooled_width(config)
    ).eval()
    randomize_projections(canvas.canvas_connector, seed + 3)
    save_checkpoint(
        folder, subject.config, planner=planner, processors=models.planner_processors(), canvas=canvas,
        components={subject.component: parts.backbone, "vae": parts.autoencoder, "scheduler": parts.scheduler},
        pipeline_class=subject.pipeline,
    )  # fmt: skip
    of = {"planner": planner, "backbone": parts.backbone, "autoencoder": parts.autoencoder, "canvas": canvas}
    return {name: models.parameters(part) for name, part in of.items()}


def _write_stock(size: models.Size, folder: Path, seed: int) -> dict[str, int]:
    text_encoder, tokenizer = models.random_text_encoder(size.planner.width, size.planner.layers, seed)
    backbone = models.random_backbone(size.backbone, seed + 1)
    autoencoder = models.random_autoencoder(size.autoencoder, seed + 2)
    SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=autoencoder, transformer=backbone, scheduler=models.scheduler()
    ).save_pretrained(str(folder))
    # transformers 4 (which optimum-onnx needs) knows the tokenizer's class by its older name only; 5 reads both.
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    parts = {"text_encoder": text_encoder, "backbone": backbone, "autoencoder": autoencoder}
    return {name: models.parameters(part) for name, part in parts.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(models.SIZES), required=True)
    parser.add_argument("--stock", action="store_true", help="the stock SanaPipeline instead of the MetaCanvas checkpoint")
    parser.add_argument("--work", type=Path, help="where to keep it; the cache's benchmarks folder by default")
    arguments = parser.parse_args()
    make = stock_checkpoint if arguments.stock else metacanvas_checkpoint
    print(make(models.SIZES[arguments.size], work_folder(arguments.work)))


if __name__ == "__main__":
    main()
