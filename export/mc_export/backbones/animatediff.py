"""AnimateDiff: Stable Diffusion 1.5 with motion modules (diffusers ``UNetMotionModel``, ``AnimateDiffPipeline``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mc_export.backbones.spec import EncoderFolders, TextStates, TextTokens
from mc_export.backbones.text_clip import clip_prompting, clip_states, clip_tokens
from mc_export.backbones.unet import UNet, in_multiples, repeated_over_frames
from mc_export.backbones.unet_attention import tell_context
from mc_runtime.bundle.manifest import Prompting


class AnimateDiff(UNet):
    """AnimateDiff (arXiv 2307.04725), as ``AnimateDiffPipeline`` runs it.

    diffusers saves the motion adapter twice: inside `unet`, which is all that is read here, and as `motion_adapter`.
    """

    name = "animatediff"
    model_classes = ("UNetMotionModel",)
    tasks = ("text-to-video",)
    canvas_tasks = ("text-to-video",)
    latent_axes = ("T", "H", "W")
    default_guidance = 7.5
    default_steps = 50
    default_frames = 16
    default_fps = 8.0
    encoders = (EncoderFolders("text_encoder", "tokenizer"),)
    plain = {  # noqa: RUF012  # read only
        "addition_embed_type": None,
        "encoder_hid_dim_type": None,
        "time_cond_proj_dim": None,
    }

    def max_latent_frames(self, config: Any) -> int | None:
        return int(config.motion_max_seq_length)

    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        rows = tell_context(model, sample.shape[0], context, context_mask)
        return {
            "sample": in_multiples(model, sample),
            "timestep": timestep,
            "encoder_hidden_states": repeated_over_frames(rows, sample.shape[2]),
        }

    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        return TextStates(clip_states(encoders[0], input_ids[0]).last)

    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        ids, mask = clip_tokens(tokenizers[0], prompts)
        return TextTokens((ids,), (mask,), mask.new_ones(mask.shape))

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        return (clip_prompting(tokenizers[0], files[0], pad_to_max=True, padding_counts=True),)
