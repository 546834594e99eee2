"""Wan: a video DiT with cross-attention to the context (diffusers ``WanTransformer3DModel``), as Wan2.2-TI2V-5B uses it.

One model makes videos from text and from a first frame: frames carry the step's timestep, a given first frame carries 0.
Checkpoints that edit and take references have more input channels than output channels; see :func:`takes_clips`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.spec import Condition, EncoderFolders, TextStates, TextTokens
from mc_export.backbones.wan_export import PreparedWan, WanContext, bias_of, prepare, row_weights, weigh_rows
from mc_export.backbones.wan_stream import WanStream
from mc_export.backbones.wan_text import umt5_states, wan_prompting, wan_tokens
from mc_export.program.base import Axis
from mc_runtime.bundle.manifest import Prompting

MASK_CHANNELS = 1
MAX_REFERENCES = 8
# Latent (height, width) by latent channels: Wan2.2-TI2V-5B at 704 x 1280 (16 pixels a cell), Wan2.1 at 480 x 832 (8).
_NATIVE = {48: (44, 80), 16: (60, 104)}


class Wan(Backbone):
    """Wan2.2-TI2V-5B (arXiv 2503.20314), as ``WanPipeline`` and, expanding timesteps, ``WanImageToVideoPipeline`` run it."""

    name = "wan"
    model_classes = ("WanTransformer3DModel",)
    component = "transformer"
    patch_embedding = "patch_embedding"
    tasks = ("text-to-video", "image-to-video")
    canvas_tasks = ("text-to-video", "image-to-video", "in-context-video", "video-editing")
    default_guidance = 5.0
    default_steps = 50
    encoders = (EncoderFolders("text_encoder", "tokenizer"),)
    unsupported_components = MappingProxyType(
        {
            "transformer_2": "models of two transformers (Wan2.2-A14B) are not supported; use Wan2.2-TI2V-5B",
            "image_encoder": "models with an image encoder (Wan2.1 image-to-video) are not supported; use Wan2.2-TI2V-5B",
        }
    )
    config_names_size = False
    latent_axes = ("T", "H", "W")
    default_frames = 121
    default_fps = 24.0
    stream = WanStream()

    def refusal(self, config: Any) -> str | None:
        channels = self.latent_channels(config)
        wide = 2 * channels + MASK_CHANNELS
        if config.patch_size[0] != 1:
            return f"patch_size is {list(config.patch_size)}: models that fold frames are not supported"
        if config.image_dim is not None or config.added_kv_proj_dim is not None:
            return "models with an image encoder (Wan2.1 image-to-video) are not supported; use Wan2.2-TI2V-5B"
        if config.in_channels not in (channels, wide):
            return (
                f"in_channels is {config.in_channels}; it must be {channels}, or {wide} where the model takes a clip to edit "
                "and references (see docs/checkpoint.md)"
            )
        return None

    def task_refusal(self, config: Any, task: str) -> str | None:
        if task in self.canvas_tasks and task not in self.tasks and not takes_clips(config):
            wide = 2 * self.latent_channels(config) + MASK_CHANNELS
            return f"{task} needs a model of {wide} input channels; this one has {config.in_channels} (see docs/checkpoint.md)"
        return super().task_refusal(config, task)

    def adopt(self, model: nn.Module) -> None:
        weigh_rows(model)

    def width(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    def context_width(self, config: Any) -> int:
        return int(config.text_dim)

    def latent_channels(self, config: Any) -> int:
        return int(config.out_channels or config.in_channels)

    def patch(self, config: Any) -> tuple[int, int, int]:
        _, height, width = config.patch_size
        return (1, int(height), int(width))

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        return _NATIVE.get(self.latent_channels(config), _NATIVE[48])

    def timestep_scale(self, config: Any) -> float:
        return 1.0

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        channels = self.latent_channels(config)
        first = (
            Condition("first_frame", (channels, 1, "H", "W"), "first_frame"),
            Condition("has_first_frame", (), "has_first_frame"),
        )
        if not takes_clips(config):
            return first
        return (
            *first,
            Condition("condition_latents", (channels, "T", "H", "W"), "condition_latents", embedded=True),
            Condition("condition_mask", (MASK_CHANNELS, "T", "H", "W"), "condition_mask", embedded=True),
            Condition("reference_frames", (channels, "R", "H", "W"), "reference_frames", embedded=True),
            Condition("reference_mask", ("R",), "reference_mask"),
        )

    def condition_axes(self, config: Any, max_tokens: int) -> tuple[Axis, ...]:
        return (Axis("R", 1, MAX_REFERENCES, 4),) if takes_clips(config) else ()

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every other clip has a first frame, and a free slot before its references."""
        examples = {"has_first_frame": (torch.arange(len(drawn["has_first_frame"])) % 2).float()}
        if takes_clips(config):
            examples["condition_mask"] = (drawn["condition_mask"] > 0).float()
            mask = torch.ones_like(drawn["reference_mask"])
            mask[::2, 0] = 0
            examples["reference_mask"] = mask
        return examples

    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        if takes_clips(config):
            tokens = tokens[:, :, tokens.shape[2] - sample.shape[2] :]
        return tokens.movedim(1, -1)

    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        references = tokens.shape[2] - residual.shape[1]
        residual = residual.movedim(-1, 1)
        return tokens + (F.pad(residual, (0, 0, 0, 0, references, 0)) if references else residual)

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        clean = self.clean_frames(sample, **conditions)
        hidden, frame_weights = self._with_first_frame(sample, clean, conditions["first_frame"]), None
        if takes_clips(model.config):
            references, frame_weights = conditions["reference_frames"], conditions["reference_mask"]
            given = torch.cat([references.to(hidden.dtype), conditions["condition_latents"].to(hidden.dtype)], dim=2)
            reference_mask = frame_weights[:, None, :, None, None].expand(-1, MASK_CHANNELS, -1, *sample.shape[-2:])
            mask = torch.cat([reference_mask, conditions["condition_mask"]], dim=2).to(hidden.dtype)
            hidden = torch.cat([torch.cat([references.to(hidden.dtype), hidden], dim=2), given, mask], dim=1)
            clean = torch.cat([torch.ones_like(frame_weights), clean], dim=1)
            frame_weights = torch.cat([frame_weights, torch.ones_like(frame_weights[:, :1]).expand(-1, sample.shape[2])], dim=1)
        arguments = {"hidden_states": hidden, "encoder_hidden_states": context}
        if isinstance(model, PreparedWan):
            return arguments | {
                "timestep": timestep, "context_weights": context_mask, "clean_frames": clean, "frame_weights": frame_weights,
            }  # fmt: skip
        _, patch_h, patch_w = self.patch(model.config)
        cells = (sample.shape[-2] // patch_h) * (sample.shape[-1] // patch_w)
        own, cross = row_weights(model)
        cross.bias = bias_of(context_mask)
        own.bias = None if frame_weights is None else bias_of(frame_weights.repeat_interleave(cells, dim=1))
        return arguments | {"timestep": (timestep[:, None] * (1 - clean)).repeat_interleave(cells, dim=1)}

    def clean_frames(self, sample: Tensor, **conditions: Tensor) -> Tensor:
        # Without a cut: frames behind the first one would have a size that the exporter takes for at least 1.
        first = (torch.arange(sample.shape[2], device=sample.device) == 0).to(torch.float32)
        return first * conditions["has_first_frame"][:, None]

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        references = output.shape[2] - sample.shape[2]
        return output[:, :, references:] if references else output

    def settled(self, sample: Tensor, **conditions: Tensor) -> Tensor:
        return self._with_first_frame(sample, self.clean_frames(sample, **conditions), conditions["first_frame"])

    def _with_first_frame(self, sample: Tensor, clean: Tensor, frame: Tensor) -> Tensor:
        """The clip `[N, C, T, H, W]` with its clean frames (`[N, T]`) replaced by the given one `[N, C, 1, H, W]`."""
        return torch.where(clean[:, None, :, None, None] > 0, frame.to(sample.dtype), sample)

    def prepare_for_export(self, model: nn.Module) -> None:
        prepare(model)

    def use_kernels(self, model: nn.Module) -> Mapping[str, int]:
        from mc_export.rewrites.wan import use_wan_kernels

        return use_wan_kernels(model)

    def prepared_context_width(self, config: Any) -> int:
        return int(config.num_layers) * 2 * self.width(config)

    def context_preparation(self, model: nn.Module) -> nn.Module:
        return WanContext(model)

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        return TextStates(umt5_states(encoders[0], input_ids[0], attention_masks[0]))

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        return wan_tokens(tokenizers[0], prompts)

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return (wan_prompting(tokenizers[0], files[0]),)


def takes_clips(config: Any) -> bool:
    """Whether the model takes a clip to edit and reference frames beside the noisy clip (paper, Figure 3).

    Ours, where the paper is silent: with C latent channels the model then has 2 C + 1 input channels. The frames are the
    references followed by the noisy clip. Channels 0..C-1 hold the references themselves, at timestep 0, and the noisy clip;
    channels C..2C-1 hold the references and the clip to edit, zeros where there is none; the last channel is 1 where the
    channels before it hold something.
    """
    channels = config.out_channels or config.in_channels
    return bool(config.in_channels == 2 * channels + MASK_CHANNELS)
