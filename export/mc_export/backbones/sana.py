"""SANA: a DiT with linear attention and cross-attention to the context (diffusers ``SanaTransformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.sana_block import use_exportable_blocks
from mc_export.backbones.sana_export import SanaContext, use_exportable_self_attention, use_prepared_context
from mc_export.backbones.sana_text import gemma_states, sana_prompting, sana_tokens
from mc_export.backbones.spec import EncoderFolders, TextStates, TextTokens
from mc_export.backbones.stream import PictureStream
from mc_runtime.bundle.manifest import Prompting

MASK_BIAS = -10000.0  # what diffusers' Sana adds to the scores of rows that do not count


class Sana(Backbone):
    """SANA (arXiv 2410.10629), as ``SanaPipeline`` runs it."""

    name = "sana"
    model_classes = ("SanaTransformer2DModel",)
    component = "transformer"
    patch_embedding = "patch_embed"
    tasks = ("text-to-image",)
    canvas_tasks = ("text-to-image", "image-editing")
    default_guidance = 4.5
    default_steps = 20
    encoders = (EncoderFolders("text_encoder", "tokenizer"),)
    selects_rows = True
    stream = PictureStream()

    def width(self, config: Any) -> int:
        return int(config.num_attention_heads * config.attention_head_dim)

    def context_width(self, config: Any) -> int:
        return int(config.caption_channels)

    def latent_channels(self, config: Any) -> int:
        return int(config.in_channels)

    def patch(self, config: Any) -> tuple[int, int, int]:
        return (1, config.patch_size, config.patch_size)

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        return (config.sample_size, config.sample_size)

    def timestep_scale(self, config: Any) -> float:
        return float(config.timestep_scale)

    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        height, width = (extent // config.patch_size for extent in sample.shape[-2:])
        return tokens.unflatten(1, (1, height, width))

    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        return tokens + residual.flatten(1, 3)

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        # Given as a bias [B, 1, L], the mask takes the same way through the model as a 0/1 mask does.
        return {
            "hidden_states": sample,
            "timestep": timestep,
            "encoder_hidden_states": context,
            "encoder_attention_mask": ((1 - context_mask.to(sample.dtype)) * MASK_BIAS)[:, None],
            **conditions,
        }

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        return output[:, : sample.shape[1]]

    def prepare_for_export(self, model: nn.Module) -> None:
        use_exportable_self_attention(model)
        use_prepared_context(model)
        use_exportable_blocks(model)

    def use_kernels(self, model: nn.Module) -> Mapping[str, int]:
        from mc_export.rewrites.sana import use_sana_kernels

        return use_sana_kernels(model)

    def prepared_context_width(self, config: Any) -> int:
        return int(config.num_layers) * 2 * self.width(config)

    def context_preparation(self, model: nn.Module) -> nn.Module:
        return SanaContext(model)

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        return TextStates(gemma_states(encoders[0], input_ids[0], attention_masks[0]))

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        return sana_tokens(tokenizers[0], prompts, negative=negative)

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return (sana_prompting(tokenizers[0], files[0]),)
