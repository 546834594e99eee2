"""SDXL: a UNet of pictures with two CLIP text encoders (diffusers ``UNet2DConditionModel``, ``StableDiffusionXLPipeline``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mc_export.backbones.spec import Condition, EncoderFolders, TextStates, TextTokens
from mc_export.backbones.text_clip import clip_prompting, clip_states, clip_tokens
from mc_export.backbones.unet import UNet, in_multiples
from mc_export.backbones.unet_attention import tell_context
from mc_runtime.bundle.manifest import Prompting

SIZE_IDS = 6  # (height, width) of the original, (top, left) of its crop, (height, width) of the target


class Sdxl(UNet):
    """SDXL (arXiv 2307.01952), as ``StableDiffusionXLPipeline`` runs it."""

    name = "sdxl"
    model_classes = ("UNet2DConditionModel",)
    tasks = ("text-to-image",)
    canvas_tasks = ("text-to-image", "image-editing")
    default_guidance = 5.0
    default_steps = 50
    encoders = (EncoderFolders("text_encoder", "tokenizer"), EncoderFolders("text_encoder_2", "tokenizer_2"))
    encoders_share_length = True
    plain = {  # noqa: RUF012  # read only
        "addition_embed_type": "text_time",
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
        "dual_cross_attention": False,
    }

    def refusal(self, config: Any) -> str | None:
        if config.in_channels != config.out_channels:
            return f"in_channels is {config.in_channels}; models for inpainting and editing pictures are not supported"
        return super().refusal(config)

    def pooled_width(self, config: Any) -> int | None:
        return int(config.projection_class_embeddings_input_dim) - SIZE_IDS * int(config.addition_time_embed_dim)

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        pooled = self.pooled_width(config)
        assert pooled is not None
        return (
            Condition("pooled", (pooled,), "pooled", per_branch=True),
            Condition("size_ids", (SIZE_IDS,), "size_ids"),
        )

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sizes that bf16 cannot hold."""
        batch = len(drawn["size_ids"])
        heights = 1031.0 + 70 * torch.arange(batch)
        ids = [heights, heights + 256, torch.zeros(batch), torch.full((batch,), 8.0), heights, heights + 192]
        return {"size_ids": torch.stack(ids, dim=1)}

    def scalar_layers(self, model: nn.Module) -> Mapping[str, tuple[str, ...]]:
        return {"size_ids": ("add_time_proj",)}

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        return {
            "sample": in_multiples(model, sample),
            "timestep": timestep,
            "encoder_hidden_states": tell_context(model, sample.shape[0], context, context_mask),
            "added_cond_kwargs": {"text_embeds": conditions["pooled"], "time_ids": conditions["size_ids"]},
        }

    def zeroes_empty_negative(self, pipeline: Mapping[str, Any]) -> bool:
        return bool(pipeline.get("force_zeros_for_empty_prompt", True))

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        first, second = (clip_states(encoder, ids) for encoder, ids in zip(encoders, input_ids, strict=True))
        return TextStates(torch.cat([first.penultimate, second.penultimate], dim=-1), second.pooled)

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        (ids, mask), (ids_2, mask_2) = (clip_tokens(tokenizer, prompts) for tokenizer in tokenizers)
        return TextTokens((ids, ids_2), (mask, mask_2), torch.ones_like(mask))

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return tuple(
            clip_prompting(tokenizer, file, pad_to_max=True, padding_counts=True)
            for tokenizer, file in zip(tokenizers, files, strict=True)
        )
