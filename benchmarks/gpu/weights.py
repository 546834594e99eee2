"""Random weights, made where they are used: models without memory first, then every parameter drawn on the device.

A freshly initialised network hardly listens to its own blocks: their gates start near zero. These weights are drawn so that
every layer counts: products keep the size of what goes in, gates are open, norms and biases are not ones and zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from benchmarks.gpu.subjects import PlannerSize, Subject
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.config import CanvasConfig, MetaCanvasConfig

Model = TypeVar("Model", bound=nn.Module)


def without_memory(make: Callable[[], Model]) -> Model:
    """A model whose parameters have no memory; its buffers (tables of positions, frequencies) are what they should be."""
    with init_empty_weights(include_buffers=False):
        return make().eval().requires_grad_(False)


def drawn(make: Callable[[], Model], device: torch.device, seed: int) -> Model:
    """A model with random bfloat16 weights, drawn on `device`; the same for the same seed and kind of device."""
    model = without_memory(make)
    generator = torch.Generator(device).manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            _draw(f"{path}.{name}", tensor, generator)
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return model.to(device)


def twin(make: Callable[[], Model], source: nn.Module, device: torch.device) -> Model:
    """Another instance with the very same weights in the same memory."""
    model = without_memory(make)
    model.load_state_dict(source.state_dict(), assign=True)
    return model.requires_grad_(False).to(device)


def bytes_of(*modules: nn.Module | None) -> int:
    """Memory of all parameters and buffers, what is shared counted once."""
    tensors = [tensor for module in modules if module is not None for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith("scale_shift_table"):
        tensor.normal_(0, 0.3, generator=generator)
        if tensor.shape[-2] == 6:  # shift, scale, gate of the attention, then of the feed-forward: half open gates
            tensor[..., 2::3, :] += 0.5
    elif tensor.ndim == 1:
        tensor.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
    else:
        tensor.normal_(0, (tensor.numel() / tensor.shape[0]) ** -0.5, generator=generator)


def planner_model(size: PlannerSize) -> Qwen2_5_VLModel:
    """A Qwen2.5-VL; its vision tower stays tiny, a request without pictures never runs it."""
    rotary = size.width // size.heads // 2
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary, "hidden_size": size.width, "intermediate_size": size.middle,
            "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
            "num_key_value_heads": size.key_value_heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1_000_000.0,
                "mrope_section": [rotary - 2 * (3 * rotary // 8), 3 * rotary // 8, 3 * rotary // 8],
            },
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": size.width,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip
    return Qwen2_5_VLModel(config)


def canvas_model(subject: Subject, config: Any) -> CanvasModel:
    """Canvas tokens and connectors for a subject whose backbone has this configuration."""
    adapter = subject.adapter
    # Steps alone have no planner; what its width would be does not matter to them.
    width = subject.planner.width if subject.planner else adapter.width(config)
    canvas = MetaCanvasConfig(canvas=CanvasConfig(grid=subject.grid, pixels_per_token=32))
    return CanvasModel(canvas, width, adapter.width(config), adapter.context_width(config), adapter.pooled_width(config))
