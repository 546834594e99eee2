"""Tiny random checkpoints, saved by the libraries' own ``save_pretrained``, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from mc_export.checkpoint.save import save_checkpoint
from mc_export.model.canvas_connector import randomize_projections
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import MetaCanvasConfig

PLANNER_DIM, BACKBONE_DIM, CONTEXT_DIM = 64, 64, 48
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "a red circle left of a blue square",
    "two green triangles above a yellow square",
    "a photo of a cat",
    "user assistant",
]


def byte_level_tokenizer(special_tokens: tuple[str, ...], vocabulary: int = 400) -> Tokenizer:
    """A byte-level BPE of Qwen2's kind that can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def tiny_processors() -> tuple[Any, Any]:
    """A Qwen2.5-VL processor's parts: tokenizer with chat template, image processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(SPECIAL_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    return tokenizer, Qwen2VLImageProcessorPil()


def tiny_planner(seed: int, vocabulary: int = 400, layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL, 64 wide, with a vision tower."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": PLANNER_DIM, "intermediate_size": 96, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": PLANNER_DIM,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def tiny_sana(seed: int, channels: int = 4, **overrides: Any) -> SanaTransformer2DModel:
    """A random SANA, 64 wide, two layers if nothing else is asked for."""
    torch.manual_seed(seed)
    config = {
        "in_channels": channels, "out_channels": channels, "num_attention_heads": 2, "attention_head_dim": 32,
        "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32,
        "cross_attention_dim": BACKBONE_DIM, "caption_channels": CONTEXT_DIM, "sample_size": 8,
    }  # fmt: skip
    return SanaTransformer2DModel(**{**config, **overrides}).eval()


def tiny_vae(seed: int, channels: int = 4) -> AutoencoderDC:
    """A random AutoencoderDC with 4 pixels per latent cell; its last stage has multiscale linear attention."""
    torch.manual_seed(seed)
    return AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.41407,
    ).eval()


def tiny_autoencoder_kl(seed: int, channels: int = 4, **overrides: Any) -> AutoencoderKL:
    """A random AutoencoderKL with 4 pixels per latent cell and norms that are not one.

    FLUX's kind is ``shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False``.
    """
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "latent_channels": channels, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3, "sample_size": 32,
    }  # fmt: skip
    return with_random_norms(AutoencoderKL(**{**config, **overrides}).eval())


def tiny_temporal_decoder(seed: int) -> AutoencoderKLTemporalDecoder:
    """A random autoencoder of Stable Video Diffusion's kind, 2 pixels per latent cell (its norms have 32 groups, always)."""
    torch.manual_seed(seed)
    return with_random_norms(
        AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1, latent_channels=4
        ).eval()
    )


def tiny_wan_autoencoder(kind: str, seed: int = 0, channels: int = 4) -> AutoencoderKLWan:
    """A random AutoencoderKLWan of kind ``"2.1"`` (stride 4 in time, 4 in space) or ``"2.2"`` (4 and 8, patches, residual)."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "base_dim": 8, "z_dim": channels, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True],
        "latents_mean": torch.randn(channels).tolist(), "latents_std": (0.5 + 2 * torch.rand(channels)).tolist(),
        "scale_factor_spatial": 4,
    }  # fmt: skip
    if kind == "2.2":
        config |= {
            "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 12,
            "scale_factor_spatial": 8,
        }  # fmt: skip
    return with_random_norms(AutoencoderKLWan(**config).eval())


def with_random_norms(model: Any) -> Any:
    """The model with norm scales and blend factors drawn anew: at one, much that is wrong does not show."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight", "mix_factor")):
            torch.nn.init.uniform_(parameter, 0.4, 1.6)
    return model


def tiny_text_encoder(seed: int, layers: int = 2) -> tuple[Gemma2Model, PreTrainedTokenizerFast]:
    """A random Gemma 2 and its tokenizer (``<bos>`` first, as Gemma's)."""
    torch.manual_seed(seed)
    raw = byte_level_tokenizer(("<pad>", "<eos>", "<bos>"))
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    config = Gemma2Config(
        vocab_size=400, hidden_size=CONTEXT_DIM, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, query_pre_attn_scalar=16,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokenizer


def tiny_metacanvas_checkpoint(
    folder: Path,
    seed: int = 0,
    conditioning: str = "planner",
    lora: bool = False,
    random_projections: bool = True,
    tasks: tuple[str, ...] = ("text-to-image",),
    prompt: dict[str, Any] | None = None,
    layers: int = 2,
) -> Path:
    """A MetaCanvas checkpoint: canvas 1 x 4 x 4 on 32 x 32 pixels, latents 8 x 8 (so the canvas is interpolated).

    A task beside text-to-image gives its planner eyes; `prompt` is that part of its `metacanvas.json`.
    """
    components: dict[str, Any] = {
        "transformer": tiny_sana(seed + 1, num_layers=layers),
        "vae": tiny_vae(seed + 2),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    if conditioning == "text_encoder":
        components["text_encoder"], components["tokenizer"] = tiny_text_encoder(seed + 3)
    settings = {
        "conditioning": conditioning, "tasks": tasks, "prompt": prompt or {},
        "canvas": {"grid": (1, 4, 4), "pixels_per_token": 8},
    }  # fmt: skip
    widths = (BACKBONE_DIM, CONTEXT_DIM, None)
    save_metacanvas(folder, seed, components, "SanaPipeline", settings, widths, random_projections, layers)
    if lora:
        save_random_lora(tiny_planner(seed, layers=layers), folder / "planner_lora", seed)
    return folder


def save_metacanvas(
    folder: Path,
    seed: int,
    components: dict[str, Any],
    pipeline_class: str,
    settings: dict[str, Any],
    widths: tuple[int, int, int | None],
    random_projections: bool = True,
    layers: int = 2,
) -> Path:
    """A MetaCanvas checkpoint around a pipeline's components.

    Args:
        folder: where it goes.
        seed: of planner and canvas.
        components: of the pipeline, by name.
        pipeline_class: as `model_index.json` names it.
        settings: of `metacanvas.json`.
        widths: of the backbone's patch-embedded latents, of its context, and of its pooled vector if it takes one.
        random_projections: whether the projections that start at zero are random, too.
        layers: of the planner.
    """
    config = MetaCanvasConfig.model_validate(settings)
    canvas = CanvasModel(config, PLANNER_DIM, *widths)
    if random_projections:
        randomize_projections(canvas.canvas_connector, seed)
    save_checkpoint(
        folder, config, planner=tiny_planner(seed, layers=layers), processors=tiny_processors(), canvas=canvas,
        components=components, pipeline_class=pipeline_class,
    )  # fmt: skip
    return folder


def save_random_lora(planner: Qwen2_5_VLForConditionalGeneration, folder: Path, seed: int) -> None:
    """A random PEFT adapter of the language model's attention and MLP, written by PEFT itself."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
    )  # fmt: skip
    get_peft_model(planner, config).save_pretrained(str(folder))


def tiny_stock_sana(folder: Path, seed: int = 0, scheduler: Any = None, layers: int = 2) -> Path:
    """A stock ``SanaPipeline`` folder, saved by diffusers."""
    text_encoder, tokenizer = tiny_text_encoder(seed + 3, layers)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(seed + 2),
        transformer=tiny_sana(seed + 1, num_layers=layers),
        scheduler=scheduler,
    ).save_pretrained(str(folder))
    return folder
