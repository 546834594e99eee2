"""Qwen2.5-VL's whole processor, pictures and clips too, where torchvision is not installed."""

from __future__ import annotations

import sys
import types
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers.video_processing_utils  # noqa: F401  # before the stand-in below, so that it finds no torchvision
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mc_runtime.bundle.vision import Vision
from tests.tiny_tokenizers import QWEN_CHAT_TEMPLATE, TextProcessor, qwen_tokenizer

TINY_VISION = Vision(
    patch=14,
    temporal_patch=2,
    merge=2,
    window=112,
    image_pixels=(4 * 784, 30 * 784),
    clip_pixels=(2 * 784, 12 * 784),
    mean=tuple(OPENAI_CLIP_MEAN),
    std=tuple(OPENAI_CLIP_STD),
    tokens_per_second=2,
    image_token_id=qwen_tokenizer().convert_tokens_to_ids("<|image_pad|>"),
    clip_token_id=qwen_tokenizer().convert_tokens_to_ids("<|video_pad|>"),
    image_text="<|vision_start|><|image_pad|><|vision_end|>",
    clip_text="<|vision_start|><|video_pad|><|vision_end|>",
    clip_fps=2.0,
    min_frames=4,
    max_frames=10,
    max_media=4,
    max_tokens=128,
)
"""Limits that are soon reached; everything else as Qwen2.5-VL has it."""


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Noise, `[*shape, 3]` bytes."""
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def _video_processor_class() -> Any:
    """`Qwen2VLVideoProcessor`: its module imports torchvision; what it calls of that is filled in below."""
    modules, name = {}, ""
    for part in ("torchvision", "transforms", "v2", "functional"):
        name = f"{name}.{part}".strip(".")
        modules[name] = types.ModuleType(name)
    with mock.patch.dict(sys.modules, modules):
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    return Qwen2VLVideoProcessor


class VideoProcessor(_video_processor_class()):  # type: ignore[misc]  # a class made at run time
    """The real processor: its sampling, sizes and patches. Torchvision's resize is Pillow's, its normalize a formula."""

    def convert_to_rgb(self, video: Any) -> Any:
        return video

    def normalize(self, image: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
        return (image - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None]

    def resize(self, videos: torch.Tensor, **arguments: Any) -> torch.Tensor:
        with mock.patch.object(TorchvisionBackend, "resize", _pillow_resize):
            return super().resize(videos, **arguments)


def _pillow_resize(self: Any, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in image.flatten(0, -4)]
    resized = [np.asarray(frame.resize((size.width, size.height), Image.Resampling.BICUBIC)) for frame in frames]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).unflatten(0, image.shape[:-3])


def seeing_processor(spec: Vision) -> TextProcessor:
    """Qwen2.5-VL's processor with the pixel limits of `spec`."""
    image_size, clip_size = (
        {"shortest_edge": least, "longest_edge": most} for least, most in (spec.image_pixels, spec.clip_pixels)
    )
    return TextProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=image_size),
        tokenizer=qwen_tokenizer(),
        video_processor=VideoProcessor(
            size=clip_size, min_frames=spec.min_frames, max_frames=spec.max_frames, cap_pixels_per_frame=False
        ),
        chat_template=QWEN_CHAT_TEMPLATE,
    )
