"""The demo's networks: real library classes, small."""

from __future__ import annotations

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from examples.shapes.video.cases import TASKS
from examples.shapes.video.world import FPS, FRAMES
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import CanvasConfig, ContextConnectorConfig, DefaultsConfig, MetaCanvasConfig, PromptConfig

LATENT_CHANNELS = 16
KEYFRAMES, GRID = 3, 4
"""Canvas tokens along time and along each side; the backbone has as many tokens."""
PLANNER_WIDTH = 160
BACKBONE_WIDTH = 192
CONTEXT_WIDTH = 192
HEAD_WIDTH = 32
PATCH, MERGE = 8, 2
"""Pixels along a patch of the vision tower, and patches along a token of it."""
PICTURE_TOKENS = 16
STEPS = 12

CALIBRATION = (
    "a red circle moves to the right",
    "a green cross moves up left of a yellow square",
    "a blue triangle stands still",
    "a black square moves to the left above a purple circle",
    "a purple triangle moves down",
    "a yellow cross moves down right of a red triangle",
)
"""Training prompts, for int8 builds."""

CONFIG = MetaCanvasConfig(
    tasks=TASKS,
    canvas=CanvasConfig(grid=(KEYFRAMES, GRID, GRID), pixels_per_token=64 // GRID),
    context_connector=ContextConnectorConfig(hidden_dim=2 * CONTEXT_WIDTH, dropout=0.1),
    prompt=PromptConfig(
        max_tokens=48,
        calibration=CALIBRATION,
        image_tokens=PICTURE_TOKENS,
        frame_tokens=PICTURE_TOKENS,
        clip_fps=FPS / 2,
        max_frames=16,
        max_media=4,
        max_vision_tokens=128,
    ),
    defaults=DefaultsConfig(steps=STEPS, guidance_scale=1.0, frames=FRAMES, fps=FPS),
)


def build_autoencoder() -> AutoencoderKLWan:
    """Wan 2.2's kind: patches of 2 x 2 pixels, residual, stride 4 in time and 8 in space: 9 frames of 64 px to 3 x 8 x 8."""
    return AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen2.5-VL's, for small pictures cut into small patches."""
    pixels = PICTURE_TOKENS * (PATCH * MERGE) ** 2
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=MERGE, min_pixels=pixels, max_pixels=4 * pixels)


def build_planner(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLModel:
    """Qwen2.5-VL, five layers, with a vision tower of three.

    The rotary base is small, so that rows and columns a few steps apart, which a large one hardly turns, are told apart.
    """
    special = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": PLANNER_WIDTH,
            "intermediate_size": 2 * PLANNER_WIDTH,
            "num_hidden_layers": 5,
            "num_attention_heads": PLANNER_WIDTH // HEAD_WIDTH,
            "num_key_value_heads": PLANNER_WIDTH // HEAD_WIDTH,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 4.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": special("<|endoftext|>"),
            "eos_token_id": special("<|endoftext|>"),
            "pad_token_id": special("<|endoftext|>"),
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 64,
            "out_hidden_size": PLANNER_WIDTH,
            "fullatt_block_indexes": [2],
        },
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )
    return Qwen2_5_VLModel(config)


def build_backbone() -> WanTransformer3DModel:
    """Wan, six layers, 2 x 2 latent cells a token; beside the noise it takes a clip to edit and references."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=BACKBONE_WIDTH // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        num_layers=6,
        ffn_dim=3 * BACKBONE_WIDTH,
        text_dim=CONTEXT_WIDTH,
        freq_dim=128,
        rope_max_seq_len=64,
    )


def build_canvas() -> CanvasModel:
    """Canvas tokens and both connectors."""
    return CanvasModel(CONFIG, PLANNER_WIDTH, BACKBONE_WIDTH, CONTEXT_WIDTH)


def build_scheduler() -> UniPCMultistepScheduler:
    """Rectified flow by UniPC, as Wan samples it."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
