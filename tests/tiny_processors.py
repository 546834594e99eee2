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

from mc_runtime.bundle.vision import Vision
from tests.tiny_tokenizers import TextProcessor, qwen_tokenizer

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat template."""


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
        chat_template=CHAT_TEMPLATE,
    )
