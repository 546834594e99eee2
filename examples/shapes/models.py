"""The demo's networks: real library classes, small. 3.5 M parameters in all."""

from __future__ import annotations

from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2Tokenizer

from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import CanvasConfig, ContextConnectorConfig, MetaCanvasConfig, PromptConfig

LATENT_CHANNELS = 8
GRID = 8
"""Canvas tokens, and latent cells, along each side of a picture."""
PLANNER_WIDTH = 128
BACKBONE_WIDTH = 128
CONTEXT_WIDTH = 128
HEAD_WIDTH = 32

CALIBRATION = (
    "a red triangle above three black triangles",
    "a black triangle in the top left corner",
    "three green squares left of a green cross",
    "two blue triangles right of a green square",
    "four purple squares",
    "a green cross above two purple circles",
    "three purple crosses above a yellow triangle",
    "a purple circle above three green crosses",
)
"""Training captions of every kind, for int8 builds."""

CONFIG = MetaCanvasConfig(
    canvas=CanvasConfig(grid=(1, GRID, GRID), pixels_per_token=8),
    context_connector=ContextConnectorConfig(hidden_dim=2 * CONTEXT_WIDTH, dropout=0.1),
    prompt=PromptConfig(max_tokens=64, calibration=CALIBRATION),
)


def build_autoencoder() -> AutoencoderDC:
    """64 px pictures to 8 x 8 latents, convolutions only."""
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(16, 32, 64, 64),
        decoder_block_out_channels=(16, 32, 64, 64),
        encoder_layers_per_block=(0, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    )


def build_planner(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLModel:
    """Qwen2.5-VL, four layers; its vision tower is there for the format and stays untrained."""
    special = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": PLANNER_WIDTH,
            "intermediate_size": 2 * PLANNER_WIDTH,
            "num_hidden_layers": 4,
            "num_attention_heads": PLANNER_WIDTH // HEAD_WIDTH,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": special("<|endoftext|>"),
            "eos_token_id": special("<|endoftext|>"),
            "pad_token_id": special("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": PLANNER_WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )
    return Qwen2_5_VLModel(config)


def build_backbone() -> SanaTransformer2DModel:
    """SANA, five layers, one latent cell a token."""
    return SanaTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=BACKBONE_WIDTH // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        num_layers=5,
        num_cross_attention_heads=BACKBONE_WIDTH // HEAD_WIDTH,
        cross_attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=BACKBONE_WIDTH,
        caption_channels=CONTEXT_WIDTH,
        sample_size=GRID,
        patch_size=1,
    )


def build_canvas() -> CanvasModel:
    """Canvas tokens and both connectors."""
    return CanvasModel(CONFIG, PLANNER_WIDTH, BACKBONE_WIDTH, CONTEXT_WIDTH)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow, Euler steps."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)
