"""Tiny random checkpoints of diffusers' UNets, saved by the libraries' own ``save_pretrained``, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.factories import save_metacanvas
from tests.tiny_tokenizers import clip_tokenizer

UNET_DIM, UNET_CONTEXT_DIM, SDXL_POOLED_DIM = 32, 40, 24
Model = TypeVar("Model", bound=nn.Module)


def randomized(model: Model, seed: int) -> Model:
    """Norms and biases too: what starts at one or zero hides what is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_sdxl(seed: int, **overrides: Any) -> UNet2DConditionModel:
    """A random UNet of SDXL's kind: two levels, the lower one with two transformer blocks of its own head count."""
    torch.manual_seed(seed)
    config = {
        "sample_size": 16, "block_out_channels": (UNET_DIM, 64), "layers_per_block": 1, "norm_num_groups": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "cross_attention_dim": UNET_CONTEXT_DIM, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": SDXL_POOLED_DIM + 6 * 8,
    }  # fmt: skip
    return randomized(UNet2DConditionModel(**{**config, **overrides}), seed)


def tiny_sd_vae(seed: int) -> AutoencoderKL:
    """A random AutoencoderKL of Stable Diffusion's kind, two pixels a latent cell."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    return randomized(vae, seed)


def tiny_clip(seed: int, width: int, tokenizer: Any, projection: int | None = None, **overrides: Any) -> Any:
    """A random CLIP text encoder, three layers, so that the penultimate states are no embeddings."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=projection or 16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **overrides,
    )  # fmt: skip
    model = CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)
    return randomized(model, seed)


def sdxl_text(seed: int) -> dict[str, Any]:
    """Both encoders with their tokenizers, by the names of a pipeline's components; the second pads with another token."""
    first, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return {
        "text_encoder": tiny_clip(seed, 16, first, hidden_act="quick_gelu"),
        "tokenizer": first,
        "text_encoder_2": tiny_clip(seed + 1, UNET_CONTEXT_DIM - 16, second, SDXL_POOLED_DIM, hidden_act="gelu"),
        "tokenizer_2": second,
    }


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """As SDXL's base model has it."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )


def tiny_stock_sdxl(folder: Path, seed: int = 0, **options: Any) -> Path:
    """A stock ``StableDiffusionXLPipeline`` folder, saved by diffusers; ``options`` are the pipeline's."""
    StableDiffusionXLPipeline(
        unet=tiny_sdxl(seed + 1),
        vae=tiny_sd_vae(seed + 2),
        scheduler=sdxl_scheduler(),
        add_watermarker=False,
        **sdxl_text(seed + 3),
        **options,
    ).save_pretrained(str(folder))
    return folder


def tiny_metacanvas_sdxl(
    folder: Path, seed: int = 0, conditioning: str = "planner", random_projections: bool = True, **settings: Any
) -> Path:
    """A MetaCanvas checkpoint: canvas 1 x 4 x 4 on 32 x 32 pixels, latents 16 x 16 (so the canvas is interpolated)."""
    components: dict[str, Any] = {"unet": tiny_sdxl(seed + 1), "vae": tiny_sd_vae(seed + 2), "scheduler": sdxl_scheduler()}
    if conditioning == "text_encoder":
        components |= sdxl_text(seed + 3)
    canvas = {"conditioning": conditioning, "canvas": {"grid": (1, 4, 4), "pixels_per_token": 8}, **settings}
    widths = (UNET_DIM, UNET_CONTEXT_DIM, SDXL_POOLED_DIM)
    return save_metacanvas(folder, seed, components, "StableDiffusionXLPipeline", canvas, widths, random_projections)


def tiny_animatediff_parts(seed: int, **adapter: Any) -> tuple[UNet2DConditionModel, MotionAdapter]:
    """A random UNet of Stable Diffusion 1.5's kind and a motion adapter for it; clips of up to 16 frames."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(UNET_DIM, 64), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=UNET_CONTEXT_DIM,
    )  # fmt: skip
    motion = MotionAdapter(
        block_out_channels=(UNET_DIM, 64), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=16,
        motion_max_seq_length=16, **adapter,
    )  # fmt: skip
    for module in motion.modules():  # its projections are zero at initialisation: motion would do nothing
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return randomized(unet, seed), randomized(motion, seed + 1)


def tiny_animatediff(seed: int) -> UNetMotionModel:
    """Both as one model."""
    return UNetMotionModel.from_unet2d(*tiny_animatediff_parts(seed)).eval()


def ddim_scheduler() -> DDIMScheduler:
    """As AnimateDiff's own examples have it."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, timestep_spacing="linspace",
        steps_offset=1,
    )  # fmt: skip


def tiny_stock_animatediff(folder: Path, seed: int = 0, scheduler: SchedulerMixin | None = None) -> Path:
    """A stock ``AnimateDiffPipeline`` folder, saved by diffusers: it joins the UNet and the adapter when it is made."""
    unet, motion = tiny_animatediff_parts(seed + 1)
    tokenizer = clip_tokenizer()
    AnimateDiffPipeline(
        unet=unet,
        motion_adapter=motion,
        vae=tiny_sd_vae(seed + 2),
        scheduler=scheduler or ddim_scheduler(),
        text_encoder=tiny_clip(seed + 3, UNET_CONTEXT_DIM, tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(str(folder))
    return folder


def tiny_metacanvas_animatediff(folder: Path, seed: int = 0, random_projections: bool = True, **settings: Any) -> Path:
    """A MetaCanvas checkpoint: three keyframes of 4 x 4 on 32 x 32 pixels, latents 16 x 16; the planner conditions."""
    components = {"unet": tiny_animatediff(seed + 1), "vae": tiny_sd_vae(seed + 2), "scheduler": ddim_scheduler()}
    canvas = {"tasks": ("text-to-video",), "canvas": {"grid": (3, 4, 4), "pixels_per_token": 8}}
    widths = (UNET_DIM, UNET_CONTEXT_DIM, None)
    return save_metacanvas(folder, seed, components, "AnimateDiffPipeline", {**canvas, **settings}, widths, random_projections)


def tiny_svd(seed: int) -> UNetSpatioTemporalConditionModel:
    """A random UNet of Stable Video Diffusion's kind; videos of 5 frames by default."""
    torch.manual_seed(seed)
    model = UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(UNET_DIM, 64), layers_per_block=1, num_attention_heads=(2, 4), num_frames=5,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=UNET_CONTEXT_DIM, addition_time_embed_dim=8, projection_class_embeddings_input_dim=3 * 8,
    )  # fmt: skip
    return randomized(model, seed)


def tiny_temporal_vae(seed: int) -> AutoencoderKLTemporalDecoder:
    """A random AutoencoderKLTemporalDecoder, two pixels a latent cell."""
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), block_out_channels=(32, 32), layers_per_block=1
    )
    return randomized(vae, seed)


def tiny_clip_vision(seed: int) -> CLIPVisionModelWithProjection:
    """A random CLIP vision encoder of 224 x 224 pixels, as that pipeline squeezes every picture to."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=UNET_CONTEXT_DIM,
    )  # fmt: skip
    return randomized(CLIPVisionModelWithProjection(config), seed)


def svd_scheduler() -> EulerDiscreteScheduler:
    """As Stable Video Diffusion has it: v-prediction, Karras sigmas, continuous timesteps."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0, timestep_spacing="leading", timestep_type="continuous",
        steps_offset=1,
    )  # fmt: skip


def tiny_stock_svd(folder: Path, seed: int = 0) -> Path:
    """A stock ``StableVideoDiffusionPipeline`` folder, saved by diffusers."""
    StableVideoDiffusionPipeline(
        unet=tiny_svd(seed + 1),
        vae=tiny_temporal_vae(seed + 2),
        scheduler=svd_scheduler(),
        image_encoder=tiny_clip_vision(seed + 3),
        feature_extractor=CLIPImageProcessorPil(),
    ).save_pretrained(str(folder))
    return folder


def tiny_metacanvas_svd(folder: Path, seed: int = 0, random_projections: bool = True, **settings: Any) -> Path:
    """A MetaCanvas checkpoint: three keyframes of 3 x 5 on 24 x 44 pixels, latents 12 x 22; the planner conditions."""
    components = {"unet": tiny_svd(seed + 1), "vae": tiny_temporal_vae(seed + 2), "scheduler": svd_scheduler()}
    canvas = {"tasks": ("image-to-video",), "canvas": {"grid": (3, 3, 6), "pixels_per_token": 8}, **settings}
    widths = (UNET_DIM, UNET_CONTEXT_DIM, None)
    return save_metacanvas(folder, seed, components, "StableVideoDiffusionPipeline", canvas, widths, random_projections)
