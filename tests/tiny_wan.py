"""A tiny random Wan2.2-TI2V pipeline, saved by diffusers, and the same as a MetaCanvas checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.factories import save_metacanvas, tiny_wan_autoencoder

CHANNELS, WIDTH, TEXT_DIM, BLOCKS = 4, 64, 48, 2
WORDS = ("a", "red", "circle", "square", "moves", "left", "right", "and", "the", "of", "video", "cat", "s", "ing")


def tiny_wan(seed: int, clips: bool = False, **overrides: Any) -> WanTransformer3DModel:
    """A random Wan, 64 wide, two layers; with `clips` it takes a clip to edit and references beside the noise."""
    torch.manual_seed(seed)
    config = {
        "in_channels": 2 * CHANNELS + 1 if clips else CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 2,
        "attention_head_dim": 32, "num_layers": BLOCKS, "text_dim": TEXT_DIM, "ffn_dim": 96, "freq_dim": 32,
    }  # fmt: skip
    return randomized(WanTransformer3DModel(**{**config, **overrides}).eval())


def randomized(model: Any) -> Any:
    """Norms and biases that are ones and zeros at initialisation, made random."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def umt5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of single letters and a few words; `</s>` comes last."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?&<>|%{}-_'\""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -4.0 - index / 10) for index, word in enumerate(WORDS)]
    pieces += [(letter, -8.0 - index / 100) for index, letter in enumerate(letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_umt5(seed: int) -> tuple[UMT5EncoderModel, T5Tokenizer]:
    """A random UMT5 encoder and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = umt5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=12, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return randomized(UMT5EncoderModel(config).eval()), tokenizer


def unipc(shift: float = 5.0) -> UniPCMultistepScheduler:
    """As Wan2.2-TI2V-5B has it."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def tiny_stock_wan(folder: Path, seed: int = 0, image_to_video: bool = False, shift: float = 5.0) -> Path:
    """A stock ``WanPipeline`` or ``WanImageToVideoPipeline`` folder, saved by diffusers."""
    encoder, tokenizer = tiny_umt5(seed + 3)
    pipeline_class = WanImageToVideoPipeline if image_to_video else WanPipeline
    pipeline_class(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=tiny_wan_autoencoder("2.2", seed + 2),
        transformer=tiny_wan(seed + 1),
        scheduler=unipc(shift),
        expand_timesteps=True,
    ).save_pretrained(str(folder))
    return folder


def tiny_metacanvas_wan(
    folder: Path, seed: int = 0, clips: bool = True, tasks: tuple[str, ...] = ("text-to-video",), **settings: Any
) -> Path:
    """A MetaCanvas checkpoint: three keyframes of 2 x 3 tokens on 64 x 96 pixels, where the latent grid is 4 x 6 tokens."""
    canvas = {"tasks": tasks, "canvas": {"grid": (3, 2, 3), "pixels_per_token": 32}, **settings}
    vae = tiny_wan_autoencoder("2.2", seed + 2)
    components = {"transformer": tiny_wan(seed + 1, clips), "vae": vae, "scheduler": unipc()}
    return save_metacanvas(folder, seed, components, "WanPipeline", canvas, (WIDTH, TEXT_DIM, None))


def noise_of(batch: int, frames: int, size: tuple[int, int], seed: int = 5) -> torch.Tensor:
    """Latents `[B, C, T, H, W]` of clips of so many pixel frames and pixels (height, width)."""
    shape = (batch, CHANNELS, 1 + (frames - 1) // 4, size[0] // 8, size[1] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
