"""Random models of a given size that behave like trained ones where it matters to a benchmark.

Freshly initialised, a SANA hardly listens to its own blocks: their gates are near zero, so engine errors inside them would not
reach the picture. `awaken` opens the gates and lets the timestep count; the activations stay finite over a whole schedule.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLImageProcessorPil,
)

from mc_export.model.canvas_connector import randomize_projections
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import CanvasConfig, MetaCanvasConfig

PLANNER_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}{% else %}"
    "<|vision_start|><|{{ content['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
WORDS = (
    "a photo of one red circle left of a blue square and two green triangles above the yellow star , on a wooden table in soft "
    "evening light , with a small dog , a large cat , three birds and an old tree behind the white house"
)


@dataclass(frozen=True)
class VisionSize:
    """A Qwen2.5-VL vision tower; tiny unless said otherwise: a request from text alone never runs it."""

    width: int = 32
    layers: int = 2
    heads: int = 2
    middle: int = 48


@dataclass(frozen=True)
class PlannerSize:
    """A Qwen2.5-VL."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    middle: int
    vocabulary: int
    vision: VisionSize = VisionSize()


@dataclass(frozen=True)
class BackboneSize:
    """A `SanaTransformer2DModel`; `cells` is the latent's side. Heads are 32 wide, as SANA's."""

    heads: int
    layers: int
    cross_heads: int
    context: int
    cells: int

    @property
    def width(self) -> int:
        """Of the patch-embedded latents."""
        return 32 * self.heads


@dataclass(frozen=True)
class AutoencoderSize:
    """An `AutoencoderDC` with 32 latent channels; the lists go from the picture inwards."""

    channels: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    attention_from: int

    @property
    def pixels_per_cell(self) -> int:
        """The stride."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class Size:
    """One size of benchmark checkpoint."""

    name: str
    planner: PlannerSize
    backbone: BackboneSize
    autoencoder: AutoencoderSize
    canvas_cells: int
    dtype: torch.dtype = torch.float32

    @property
    def pixels(self) -> int:
        """Side of the picture."""
        return self.backbone.cells * self.autoencoder.pixels_per_cell


MID = Size(
    name="mid",
    planner=PlannerSize(width=512, layers=8, heads=8, key_value_heads=2, middle=2752, vocabulary=2000),
    backbone=BackboneSize(heads=16, layers=8, cross_heads=16, context=512, cells=32),
    autoencoder=AutoencoderSize((64, 128, 256, 256), (1, 1, 1, 1), (1, 1, 1, 1), attention_from=2),
    canvas_cells=16,
)
#: As deep as SANA-1.6B: the connector is one block however deep the backbone is, so depth decides what the canvas costs.
MID_DEEP = replace(MID, name="mid-deep", backbone=replace(MID.backbone, layers=20))
#: SANA-1.6B at 1024 px and dc-ae-f32c32-sana as published; the planner is Qwen2.5-VL-3B's width with 2 of its 36 layers.
REAL = Size(
    name="real",
    planner=PlannerSize(width=2048, layers=2, heads=16, key_value_heads=2, middle=11008, vocabulary=2000),
    backbone=BackboneSize(heads=70, layers=20, cross_heads=20, context=2304, cells=32),
    autoencoder=AutoencoderSize((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), (3, 3, 3, 3, 3, 3), attention_from=3),
    canvas_cells=32,
    dtype=torch.bfloat16,
)
#: The same with the planner as published.
REAL_3B = Size(
    name="real-3b",
    planner=PlannerSize(width=2048, layers=36, heads=16, key_value_heads=2, middle=11008, vocabulary=151936),
    backbone=REAL.backbone,
    autoencoder=REAL.autoencoder,
    canvas_cells=32,
    dtype=torch.bfloat16,
)
SIZES = {size.name: size for size in (MID, MID_DEEP, REAL, REAL_3B)}


def random_planner(size: PlannerSize, seed: int) -> Qwen2_5_VLModel:
    """A Qwen2.5-VL with its library's own initialisation."""
    torch.manual_seed(seed)
    head = size.width // size.heads
    rotary = head // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": size.middle,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1_000_000.0,
                "mrope_section": [rotary // 4, 3 * rotary // 8, 3 * rotary // 8],
            },
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": size.vision.layers, "hidden_size": size.vision.width, "intermediate_size": size.vision.middle,
            "num_heads": size.vision.heads, "out_hidden_size": size.width,
            "fullatt_block_indexes": list(range(1, size.vision.layers, 2)),
        },
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip
    return Qwen2_5_VLModel(config).eval()


def random_backbone(size: BackboneSize, seed: int) -> SanaTransformer2DModel:
    """A SANA whose blocks, timestep and context all reach its output."""
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_attention_heads=size.heads, attention_head_dim=32, num_layers=size.layers,
        num_cross_attention_heads=size.cross_heads, cross_attention_head_dim=size.width // size.cross_heads,
        cross_attention_dim=size.width, caption_channels=size.context, sample_size=size.cells, patch_size=1,
    )  # fmt: skip
    awaken(model, seed)
    return model.eval()


def awaken(model: SanaTransformer2DModel, seed: int) -> None:
    """Opens the gates of every block, and makes the modulation depend on the timestep."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.time_embed.linear.weight.mul_(4)
        for block in model.transformer_blocks:
            table = block.scale_shift_table  # [shift, scale, gate] of the attention, then of the Mix-FFN
            table.copy_(torch.randn(table.shape, generator=generator) * 0.3)
            table[2::3] += 0.5
        model.proj_out.weight.mul_(1.5)


def random_autoencoder(size: AutoencoderSize, seed: int) -> AutoencoderDC:
    """An AutoencoderDC of SANA's kind."""
    torch.manual_seed(seed)
    stages = len(size.channels)
    types = tuple("ResBlock" if stage < size.attention_from else "EfficientViTBlock" for stage in range(stages))
    scales: tuple[Any, ...] = tuple(() if stage < size.attention_from else (5,) for stage in range(stages))
    return AutoencoderDC(
        in_channels=3, latent_channels=32, attention_head_dim=32, encoder_block_types=types, decoder_block_types=types,
        encoder_block_out_channels=size.channels, decoder_block_out_channels=size.channels,
        encoder_layers_per_block=size.encoder_layers, decoder_layers_per_block=size.decoder_layers,
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales, upsample_block_type="interpolate",
        downsample_block_type="conv", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip


def random_canvas(size: Size, seed: int) -> CanvasModel:
    """Canvas tokens and connectors; the projections that training starts at zero are random."""
    torch.manual_seed(seed)
    model = CanvasModel(canvas_config(size), size.planner.width, size.backbone.width, size.backbone.context)
    model.eval()
    randomize_projections(model.canvas_connector, seed)
    return model


def canvas_config(size: Size) -> MetaCanvasConfig:
    """`metacanvas.json`: the planner conditions the backbone."""
    canvas = CanvasConfig(grid=(1, size.canvas_cells, size.canvas_cells), pixels_per_token=size.pixels // size.canvas_cells)
    return MetaCanvasConfig(conditioning="planner", canvas=canvas)


def random_text_encoder(width: int, layers: int, seed: int) -> tuple[Gemma2Model, PreTrainedTokenizerFast]:
    """A Gemma 2 and its tokenizer, which reads `SanaPipeline`'s instruction in about as many tokens as the published one."""
    defaults = inspect.signature(SanaPipeline.__call__).parameters
    instruction = defaults["complex_human_instruction"].default
    raw = byte_level_tokenizer(("<pad>", "<eos>", "<bos>"), [*instruction, WORDS], 2000)
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="right"
    )
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=2000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64, query_pre_attn_scalar=64,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokenizer


def planner_processors() -> tuple[Any, Any]:
    """The planner's tokenizer with a chat template of Qwen2.5-VL's form, and its image processor."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(PLANNER_SPECIALS, [WORDS, "system user assistant You are a helpful"], 600),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    return tokenizer, Qwen2VLImageProcessorPil()


def byte_level_tokenizer(specials: tuple[str, ...], texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE learned from `texts`; it encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer


def scheduler() -> DPMSolverMultistepScheduler:
    """As the published SANA's: DPM-Solver++ 2M on the flow, shift 3."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint",
    )  # fmt: skip


def parameters(module: nn.Module) -> int:
    """How many."""
    return sum(parameter.numel() for parameter in module.parameters())
