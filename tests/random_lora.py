"""Random LoRAs, written by diffusers and PEFT themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = [f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ATTENTION]


def random_lora(pipeline: Any, folder: Path, *, seed: int, rank: int, alpha: float, layers: list[str]) -> Path:
    """A LoRA of the pipeline's denoiser as diffusers saves it, with a B that changes something."""
    generator = torch.Generator().manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)
    part = "transformer" if hasattr(pipeline, "transformer") else "unet"
    denoiser = getattr(pipeline, part)
    denoiser.add_adapter(config, adapter_name=f"made{seed}")
    for name, weight in denoiser.named_parameters():
        if f"made{seed}" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    saved = {
        f"{part}_lora_layers": _adapter_state(denoiser, f"made{seed}"),
        f"{part}_lora_adapter_metadata": {**config.to_dict(), "target_modules": layers},
    }
    pipeline.save_lora_weights(folder, **saved)
    denoiser.delete_adapters(f"made{seed}")
    return folder / "pytorch_lora_weights.safetensors"


def _adapter_state(model: Any, name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name)
    return state
