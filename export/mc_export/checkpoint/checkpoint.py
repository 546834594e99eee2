"""An opened checkpoint: what its files say, and its models when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mc_export.autoencoders.base import Autoencoder, Strides
from mc_export.autoencoders.registry import AUTOENCODERS
from mc_export.backbones.base import Backbone
from mc_export.checkpoint import layout
from mc_export.checkpoint.components import load_component, load_pretrained, read_canvas_weights
from mc_export.checkpoint.defaults import Defaults, defaults_of
from mc_export.checkpoint.hashing import sha256_of_files
from mc_export.checkpoint.source import is_finite, read_json
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import METACANVAS_FILE, MetaCanvasConfig
from mc_export.model.injection import CanvasBackbone
from mc_export.model.lora import apply_planner_lora
from mc_export.model.planner import Planner
from mc_runtime.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Configurations are read at once, weights when a ``load_*`` method asks for them.

    Attributes:
        path: its folder.
        index: ``model_index.json``: component to (library, class).
        backbone: the kind of its diffusion backbone.
        config: ``metacanvas.json``, or None for a stock pipeline.
        options: the rest of ``model_index.json``: the pipeline's own configuration.
    """

    path: Path
    index: dict[str, tuple[str, str]]
    backbone: Backbone
    config: MetaCanvasConfig | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether this is a diffusers pipeline without a canvas."""
        return self.config is None

    @property
    def conditioning(self) -> Literal["planner", "text_encoder", "image_encoder"]:
        """Where the backbone's context comes from: ``planner``, or its own encoder: ``text_encoder`` or ``image_encoder``."""
        if self.config is not None and self.config.conditioning == "planner":
            return "planner"
        return "text_encoder" if self.backbone.image_encoder is None else "image_encoder"

    @property
    def zeroes_empty_negative(self) -> bool:
        """Whether zeros stand for an empty negative prompt's context and pooled vector."""
        return self.conditioning != "planner" and self.backbone.zeroes_empty_negative(self.options)

    @property
    def canvas_widths(self) -> tuple[int, int, int | None]:
        """Widths of the backbone's patch-embedded latents, of its context, and of its pooled vector if it takes one."""
        config, backbone = self.model_config, self.backbone
        return backbone.width(config), backbone.context_width(config), backbone.pooled_width(config)

    @cached_property
    def sha256(self) -> str:
        """Content hash over everything the runtime reads of the checkpoint."""
        folders = [self.path / name for name in (*self.index, layout.PLANNER, layout.PROCESSOR, layout.PLANNER_LORA)]
        files = [path for folder in folders if folder.is_dir() for path in folder.rglob("*") if path.is_file()]
        single = (layout.MODEL_INDEX, METACANVAS_FILE, layout.CANVAS_WEIGHTS)
        return sha256_of_files(self.path, [*files, *(self.path / name for name in single if (self.path / name).is_file())])

    def component_config(self, component: str) -> dict[str, Any]:
        """``config.json`` of a component.

        Raises:
            CheckpointError: unreadable, or a number in it is not finite; the message names its key.
        """
        file = self.path / component / "config.json"
        config: dict[str, Any] = read_json(file)
        for key, value in config.items():
            if not is_finite(value):
                raise CheckpointError(f"{file}: {key} holds NaN or an infinite number; fetch the file again")
        return config

    def load_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The backbone's diffusers model, in evaluation mode."""
        return load_component(self.path, self.backbone.component, self.index, dtype)

    def load_vae(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The autoencoder."""
        return load_component(self.path, layout.VAE, self.index, dtype)

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
        """The text encoders that the checkpoint kept, in the order of the backbone's."""
        return [load_component(self.path, encoder.model, self.index, dtype) for encoder in self.backbone.encoders]

    def load_image_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The vision model whose embedding of a picture is a stock checkpoint's context."""
        assert self.backbone.image_encoder is not None
        return load_component(self.path, self.backbone.image_encoder, self.index, dtype)

    @property
    def image_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the channels that its pictures are normalised with.

        Raises:
            CheckpointError: its image processor does not say them.
        """
        file = self.path / layout.FEATURE_EXTRACTOR / layout.IMAGE_SETTINGS
        settings = read_json(file)
        mean, deviation = (settings.get(key) for key in ("image_mean", "image_std"))
        for key, numbers in (("image_mean", mean), ("image_std", deviation)):
            if not isinstance(numbers, list) or len(numbers) != 3 or not all(isinstance(each, int | float) for each in numbers):
                raise CheckpointError(f"{file}: {key} must be three numbers")
        return tuple(map(float, mean)), tuple(map(float, deviation))

    def load_tokenizers(self) -> list[Any]:
        """Their tokenizers, fast."""
        return [
            load_pretrained("transformers", "AutoTokenizer", self.path / encoder.tokenizer)
            for encoder in self.backbone.encoders
        ]

    def load_planner_tokenizer(self) -> Any:
        """The tokenizer of the planner's processor, with its chat template. (``AutoProcessor`` itself needs torchvision.)"""
        return load_pretrained("transformers", "AutoTokenizer", self.path / layout.PROCESSOR)

    def load_image_processor(self) -> Any:
        """The planner's image processor, the one that works on Pillow pictures."""
        return load_pretrained("transformers", "Qwen2VLImageProcessorPil", self.path / layout.PROCESSOR)

    def load_planner_config(self) -> Any:
        """The planner's configuration with transformers' defaults filled in."""
        return load_pretrained("transformers", "Qwen2_5_VLConfig", self.path / layout.PLANNER)

    def load_scheduler(self) -> Any:
        """The checkpoint's own diffusers scheduler."""
        library, name = self.index[layout.SCHEDULER]
        if library != "diffusers":
            raise CheckpointError(f"{self.path}: scheduler is a class of {library!r}; only diffusers' are loaded")
        return load_pretrained("diffusers", name, self.path / layout.SCHEDULER)

    def load_planner(self, canvas: CanvasModel, dtype: torch.dtype = torch.float32) -> Planner:
        """The planner with its canvas tokens and, if the checkpoint has one, its LoRA on the canvas rows."""
        qwen: Any = self._load_qwen(dtype)
        lora = self.path / layout.PLANNER_LORA
        rows = apply_planner_lora(qwen, lora) if lora.is_dir() else None
        return Planner(qwen, canvas.canvas_tokens, rows).eval()

    def load_vision_tower(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The planner's vision tower."""
        qwen: Any = self._load_qwen(dtype)
        tower: nn.Module = qwen.visual
        return tower

    def _load_qwen(self, dtype: torch.dtype) -> nn.Module:
        return load_component(self.path, layout.PLANNER, {layout.PLANNER: ("transformers", "Qwen2_5_VLModel")}, dtype)

    def load_canvas(self, dtype: torch.dtype = torch.float32) -> CanvasModel:
        """Canvas tokens and connectors."""
        if self.config is None:
            raise CheckpointError(f"{self.path}: a stock pipeline has no canvas; make one with `mc-runtime assemble`")
        text = self.component_config(layout.PLANNER)
        planner_dim = text.get("text_config", text).get("hidden_size")
        if not isinstance(planner_dim, int):
            raise CheckpointError(f"{self.path}/{layout.PLANNER}/config.json: no hidden_size; is it a Qwen2.5-VL?")
        try:
            with torch.device("meta"):  # sizes that are wrong may be larger than the memory
                expected = CanvasModel(self.config, planner_dim, *self.canvas_widths)
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.path}/{METACANVAS_FILE}: no canvas of these sizes ({reason})") from error
        weights = read_canvas_weights(expected, self.path / layout.CANVAS_WEIGHTS)
        canvas = CanvasModel(self.config, planner_dim, *self.canvas_widths)
        canvas.load_state_dict(weights)
        return canvas.to(dtype).eval()

    def load_backbone(self, canvas: CanvasModel | None, dtype: torch.dtype = torch.float32) -> CanvasBackbone:
        """The backbone with the canvas connector behind its patch embedding (None: as published)."""
        return CanvasBackbone(self.backbone, self.load_model(dtype), canvas.canvas_connector if canvas else None).eval()

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The description of its autoencoder's class."""
        library, name = self.index[layout.VAE]
        if library != "diffusers":
            raise CheckpointError(f"{self.path}: vae is a class of {library!r}; only diffusers' are loaded")
        if name not in AUTOENCODERS:
            raise CheckpointError(f"{self.path}: vae {name} is not supported; supported classes: {', '.join(AUTOENCODERS)}")
        return AUTOENCODERS[name]

    @cached_property
    def strides(self) -> Strides:
        """Frames per latent frame and output pixels per latent cell: the autoencoder's strides."""
        return self.autoencoder.strides(self.vae_config)

    @property
    def pixels_per_latent(self) -> int:
        """Output pixels per latent cell along h and w."""
        return self.strides.space

    @property
    def default_latent_size(self) -> tuple[int, int]:
        """Latent (height, width) it was made for; the canvas's where the backbone's configuration names no size."""
        if self.config is None or self.backbone.config_names_size:
            return self.backbone.default_latent_size(self.model_config)
        pixels = self.config.canvas.pixels_per_token
        rows, columns = (extent * pixels // self.pixels_per_latent for extent in self.config.canvas.grid[1:])
        return rows, columns

    @property
    def default_size(self) -> tuple[int, int]:
        """The same in pixels."""
        height, width = self.default_latent_size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    @property
    def reference_sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes (height, width) in pixels to which an input picture is brought; none: the output's.

        A stock checkpoint has its pipeline's. One with a canvas has the same proportions at the area of its own pictures.
        """
        published = self.backbone.reference_sizes(self.model_config)
        if self.config is None or not published:
            return published
        area = math.prod(max(published, key=lambda size: min(size) / max(size)))
        scale = math.sqrt(math.prod(self.default_size) / area)
        multiple = self.backbone.size_multiple(self.model_config) * self.pixels_per_latent
        scaled = ((max(1, round(side * scale / multiple)) * multiple for side in size) for size in published)
        return tuple(dict.fromkeys((height, width) for height, width in scaled))

    @cached_property
    def defaults(self) -> Defaults:
        """What a request gets that does not say."""
        return defaults_of(self.backbone, self.model_config, self.config)

    @cached_property
    def model_config(self) -> Any:
        """The backbone's configuration with the class's defaults filled in.

        Raises:
            CheckpointError: it is none of the class's, or of a kind that is not supported.
        """
        component = self.backbone.component
        config = self._whole_config(component)
        if reason := self.backbone.refusal(config):
            raise CheckpointError(f"{self.path}/{component}/config.json: {reason}")
        return config

    @cached_property
    def vae_config(self) -> Any:
        """The autoencoder's configuration with the class's defaults filled in."""
        return self._whole_config(layout.VAE)

    def _whole_config(self, component: str) -> Any:
        import diffusers

        name, config = self.index[component][1], self.component_config(component)
        try:
            with torch.device("meta"):
                return getattr(diffusers, name).from_config(config).config
        except Exception as error:  # a configuration can be wrong in as many ways as there are types
            where = f"{self.path}/{component}/config.json"
            raise CheckpointError(f"{where}: not a {name}'s ({' '.join(str(error).split())[:400]})") from error
