"""The *mid* sizes of the backbones beside SANA: random models of the published shapes, narrower, and the request of each.

A mid model is as deep as it takes for its canvas connector, one block however deep the model, to cost about the share of a step
that it costs the published one. Freshly initialised, most of them hardly listen to timesteps, to their context or to
their own blocks; `awaken` mends that, as in `benchmarks.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from PIL import Image
from torch import nn

from benchmarks.models import PlannerSize, VisionSize
from mc_export.model.config import CanvasConfig, MetaCanvasConfig, Task

CONTEXT = 512
POOLED = 256
PLANNER = PlannerSize(
    width=512, layers=8, heads=8, key_value_heads=2, middle=2752, vocabulary=2000,
    vision=VisionSize(width=320, layers=8, heads=4, middle=856),
)  # fmt: skip


class Parts(NamedTuple):
    """What of a pipeline is not the planner's and the canvas's."""

    backbone: nn.Module
    autoencoder: nn.Module
    scheduler: Any


@dataclass(frozen=True)
class Subject:
    """One backbone at mid size, and what is asked of it.

    Attributes:
        name: of the backbone.
        pipeline: diffusers class that `model_index.json` names.
        component: folder of the backbone.
        task: what is asked for; `shows` says whether with a picture.
        parts: makes them from a seed.
        size: (height, width) in pixels.
        per_token: pixels of a canvas token's side.
        keyframes: of the canvas.
        frames: of a video.
        steps: of the request; guidance is the backbone's default.
    """

    name: str
    pipeline: str
    component: str
    task: Task
    parts: Callable[[int], Parts]
    size: tuple[int, int]
    steps: int
    per_token: int
    keyframes: int = 1
    frames: int | None = None
    shows: bool = False

    @property
    def config(self) -> MetaCanvasConfig:
        """`metacanvas.json`: the planner conditions the backbone."""
        rows, columns = (side // self.per_token for side in self.size)
        canvas = CanvasConfig(grid=(self.keyframes, rows, columns), pixels_per_token=self.per_token)
        return MetaCanvasConfig(tasks=(self.task,), conditioning="planner", canvas=canvas)

    @property
    def least_ratio(self) -> float:
        """What is wanted of its best bundle, as times eager fp32: more of a DiT, which is all matrix products."""
        return 2.0 if self.component == "unet" else 3.0

    @property
    def media(self) -> dict[str, Any]:
        """Further arguments of `generate`."""
        media: dict[str, Any] = {"image": picture(self.size)} if self.shows else {}
        return media | ({} if self.frames is None else {"frames": self.frames})


def flux(seed: int) -> Parts:
    """FLUX.1-Kontext, 512 wide: 5 double and 10 single blocks of the published 19 and 38."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=5, num_single_layers=10, attention_head_dim=128, num_attention_heads=4,
        joint_attention_dim=CONTEXT, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    awaken(model, seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    vae = picture_autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return Parts(model.eval(), vae, scheduler)


def wan(seed: int) -> Parts:
    """Wan2.2-TI2V, 384 wide: 24 blocks of the published 30."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        in_channels=48, out_channels=48, num_attention_heads=3, attention_head_dim=128, num_layers=24, text_dim=CONTEXT,
        ffn_dim=1792, freq_dim=256,
    )  # fmt: skip
    awaken(model, seed)
    vae = AutoencoderKLWan(
        base_dim=16, decoder_base_dim=16, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=1, patch_size=2, in_channels=12,
        out_channels=12, temperal_downsample=[False, True, True], is_residual=True, scale_factor_spatial=16,
        scale_factor_temporal=4, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, num_train_timesteps=1000
    )
    return Parts(model.eval(), vae.eval(), scheduler)


def sdxl(seed: int) -> Parts:
    """SDXL, 64 to 256 channels of the published 320 to 1280, with 2 and 4 transformer blocks a level of 2 and 10."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=48, block_out_channels=(64, 128, 256), attention_head_dim=(1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 4),
        use_linear_projection=True, cross_attention_dim=CONTEXT, addition_embed_type="text_time", addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=POOLED + 6 * 64,
    )  # fmt: skip
    awaken(model, seed)
    return Parts(model.eval(), picture_autoencoder(4, scaling_factor=0.13025), EulerDiscreteScheduler(**_NOISE))


def svd(seed: int) -> Parts:
    """Stable Video Diffusion, 64 to 256 channels of the published 320 to 1280."""
    torch.manual_seed(seed)
    model = UNetSpatioTemporalConditionModel(
        sample_size=20, block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4), num_frames=5,
        cross_attention_dim=CONTEXT, addition_time_embed_dim=64, projection_class_embeddings_input_dim=3 * 64,
    )  # fmt: skip
    awaken(model, seed)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1, latent_channels=4
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous",
        steps_offset=1,
    )  # fmt: skip
    return Parts(model.eval(), vae.eval(), scheduler)


def animatediff(seed: int) -> Parts:
    """AnimateDiff, 64 to 256 channels of the published 320 to 1280."""
    torch.manual_seed(seed)
    channels = (64, 128, 256, 256)
    unet = UNet2DConditionModel(sample_size=24, block_out_channels=channels, attention_head_dim=4, cross_attention_dim=CONTEXT)
    motion = MotionAdapter(block_out_channels=channels, motion_num_attention_heads=4, motion_max_seq_length=32)
    for module in motion.modules():
        if isinstance(module, nn.Linear):  # at initialisation its projections are zero: motion would do nothing
            nn.init.normal_(module.weight, std=0.5 / module.in_features**0.5)
    model = UNetMotionModel.from_unet2d(unet, motion)
    awaken(model, seed)
    scheduler = DDIMScheduler(**{**_NOISE, "beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "linspace"})
    return Parts(model.eval(), picture_autoencoder(4, (32, 64, 64, 64), scaling_factor=0.18215), scheduler)


# Trained models predict noise here; a random one that should would let the latents grow to the noise's whole scale.
_NOISE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading", "prediction_type": "v_prediction",
}  # fmt: skip


def picture_autoencoder(latents: int, channels: tuple[int, ...] = (32, 64, 128, 128), **options: Any) -> AutoencoderKL:
    """An AutoencoderKL of 8 pixels a latent cell."""
    return AutoencoderKL(
        block_out_channels=channels, latent_channels=latents, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **options,
    ).eval()  # fmt: skip


def awaken(model: Any, seed: int) -> None:
    """Opens gates, makes modulation depend on the timestep and blocks on the context, and gives predictions unit scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            modulation = getattr(module, "linear", None) if type(module).__name__.startswith("AdaLayerNormZero") else None
            if modulation is not None:  # [shift, scale, gate] once or twice
                modulation.weight.mul_(4)
                modulation.bias.copy_(torch.randn(modulation.bias.shape, generator=generator) * 0.3)
                modulation.bias.unflatten(0, (-1, modulation.in_features))[2::3] += 0.5
            table = getattr(module, "scale_shift_table", None)
            if isinstance(table, nn.Parameter):
                table.copy_(torch.randn(table.shape, generator=generator) * 0.3)
                if table.shape[1] == 6:
                    table[:, 2::3] += 0.5
            if name.endswith("attn2.to_out.0"):
                module.weight.mul_(CONTEXT_GAIN)
        if hasattr(model, "condition_embedder"):
            model.condition_embedder.time_proj.weight.mul_(4)
        last = model.proj_out if hasattr(model, "proj_out") else model.conv_out
        last.weight.mul_(1.7 if isinstance(last, nn.Linear) else 3.0)  # what torch draws for a layer makes its outputs small


CONTEXT_GAIN = 4.0


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth picture of (height, width) pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("flux-kontext", "FluxKontextPipeline", "transformer", "image-editing", flux, (256, 256), 8, 16, shows=True),
        Subject("wan", "WanPipeline", "transformer", "text-to-video", wan, (288, 288), 6, 32, 3, frames=9),
        Subject("sdxl", "StableDiffusionXLPipeline", "unet", "text-to-image", sdxl, (384, 384), 8, 24),
        Subject("svd", "StableVideoDiffusionPipeline", "unet", "image-to-video", svd, (128, 192), 5, 16, 3, 5, shows=True),
        Subject("animatediff", "AnimateDiffPipeline", "unet", "text-to-video", animatediff, (192, 192), 6, 24, 3, 6),
    )
}
