"""The editing demo's networks: FLUX.1-Kontext's classes, small, and a Qwen2.5-VL that sees. 3.6 M parameters in all."""

from __future__ import annotations

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.shapes.data import SIDE
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import CanvasConfig, ContextConnectorConfig, DefaultsConfig, MetaCanvasConfig, PromptConfig

LATENT_CHANNELS = 4
GRID = 8
"""Canvas tokens, vision tokens and latent tokens along each side of a picture."""
WIDTH = 128
"""Of the planner, the backbone and the context."""
POOLED_WIDTH = 64
HEAD_WIDTH = 32
VISION_PATCH = 8
VISION_MERGE = 1
STEPS = 10
"""Of a request that names none; FLUX's own default is 28."""

CALIBRATION = (
    "make the red circle green",
    "make the blue square round",
    "move the black triangle left",
    "move the yellow cross down",
    "take the black circle away",
    "take the green cross away",
)
"""Training instructions of every kind, for int8 builds."""

CONFIG = MetaCanvasConfig(
    tasks=("image-editing",),
    canvas=CanvasConfig(grid=(1, GRID, GRID), pixels_per_token=SIDE // GRID),
    context_connector=ContextConnectorConfig(hidden_dim=WIDTH, dropout=0.0),
    prompt=PromptConfig(max_tokens=64, calibration=CALIBRATION, image_tokens=GRID**2),
    defaults=DefaultsConfig(steps=STEPS),
)


def build_autoencoder() -> AutoencoderKL:
    """64 px pictures to 16 x 16 latents, convolutions only; no quantising convolutions, as FLUX's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_planner(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLModel:
    """Qwen2.5-VL, four layers, with a vision tower of two that sees the picture as a grid of `GRID` x `GRID` tokens.

    Qwen gives rotary frequencies to time, rows and columns in falling order: the columns' must still tell neighbouring cells
    apart, hence the small base.
    """
    special = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": WIDTH // HEAD_WIDTH,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "mrope_section": [2, 7, 7]},
            "bos_token_id": special("<|endoftext|>"),
            "eos_token_id": special("<|endoftext|>"),
            "pad_token_id": special("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": VISION_PATCH,
            "spatial_merge_size": VISION_MERGE,
            "window_size": SIDE,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )
    return Qwen2_5_VLModel(config)


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2.5-VL's; whatever its size, a picture becomes about `GRID` x `GRID` tokens."""
    return Qwen2VLImageProcessorPil(patch_size=VISION_PATCH, merge_size=VISION_MERGE, min_pixels=SIDE**2, max_pixels=SIDE**2)


def build_backbone() -> FluxTransformer2DModel:
    """FLUX, one double stream and four single stream blocks."""
    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=WIDTH // HEAD_WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_canvas() -> CanvasModel:
    """Canvas tokens and all connectors."""
    return CanvasModel(CONFIG, WIDTH, WIDTH, WIDTH, POOLED_WIDTH)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, Euler steps."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)
