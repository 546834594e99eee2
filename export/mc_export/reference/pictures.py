"""Pictures and clips for the reference, by transformers' own processor, tower and positions.

The independent check of `mc_runtime.prompting` and of the `vision` engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_utils import SizeDict

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.model.config import MetaCanvasConfig, PromptConfig
from mc_export.model.planner import Planner
from mc_export.reference.prompts import chat_text
from mc_export.vision import clip_limits, pixel_limits
from mc_runtime.media.clip import Clip

IMAGE, CLIP = "image", "video"


@dataclass(frozen=True)
class Pictures:
    """What transformers' processor makes of pictures and clips, those of a kind together.

    Attributes:
        kinds: `image` or `video`, in the order they are shown.
        patches: by kind, `pixel_values` `[N, C * frames * patch * patch]`.
        grid_thw: by kind, `[pictures, 3]` in patches.
        seconds: how long a temporal patch of each clip lasts.
    """

    kinds: tuple[str, ...]
    patches: dict[str, Tensor]
    grid_thw: dict[str, Tensor]
    seconds: tuple[float, ...]


class PictureReader:
    """The checkpoint's own image processor; clips go through it frame by frame (their own processor needs torchvision)."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.config is not None
        self._processor = checkpoint.load_image_processor()
        self._prompt: PromptConfig = checkpoint.config.prompt
        self._image_pixels, self._clip_pixels = pixel_limits(checkpoint, self._processor)

    def __call__(self, media: Sequence[Image.Image | np.ndarray | Clip]) -> Pictures:
        """Patches and grids of pictures (Pillow or u8 `[h, w, 3]`) and clips of such frames."""
        kinds = tuple(CLIP if isinstance(one, Clip) else IMAGE for one in media)
        patches: dict[str, list[Tensor]] = {IMAGE: [], CLIP: []}
        grids: dict[str, list[Tensor]] = {IMAGE: [], CLIP: []}
        seconds = []
        for kind, one in zip(kinds, media, strict=True):
            if isinstance(one, Clip):
                made, grid, lasts = self._clip(one)
                seconds.append(lasts)
            else:
                size = {"shortest_edge": self._image_pixels[0], "longest_edge": self._image_pixels[1]}
                read = self._processor(_pillow(one), size=size, return_tensors="pt")
                made, grid = read.pixel_values, read.image_grid_thw[0]
            patches[kind].append(made)
            grids[kind].append(grid)
        return Pictures(
            kinds,
            {kind: torch.cat(made) for kind, made in patches.items() if made},
            {kind: torch.stack(made) for kind, made in grids.items() if made},
            tuple(seconds),
        )

    def _clip(self, clip: Clip) -> tuple[Tensor, Tensor, float]:
        """Patches and grid of a clip, and the seconds that a temporal patch of it lasts."""
        processor, depth = self._processor, self._processor.temporal_patch_size
        indices = _sampled(len(clip.frames), clip.fps, depth, self._prompt)
        size = SizeDict(shortest_edge=self._clip_pixels[0], longest_edge=self._clip_pixels[1])
        frames = []
        for index in indices:
            array = np.asarray(_pillow(clip.frames[index])).transpose(2, 0, 1)
            array = processor.resize(array, size, processor.resample, processor.patch_size * processor.merge_size)
            array = processor.normalize(
                processor.rescale(array, processor.rescale_factor), processor.image_mean, processor.image_std
            )
            flat, rows, columns = processor.patchify(array, processor.patch_size, processor.merge_size, depth)
            frames.append(torch.from_numpy(np.ascontiguousarray(flat)).unflatten(1, (3, depth, -1)))
        frames += [frames[-1]] * (-len(frames) % depth)
        # Of every frame's patches, which stand `depth` times, the one at its own place in time.
        times = [
            torch.stack([frames[start + place][:, :, place] for place in range(depth)], dim=2).flatten(1)
            for start in range(0, len(frames), depth)
        ]
        return torch.cat(times), torch.tensor([len(times), rows, columns]), depth / (len(indices) / len(clip.frames) * clip.fps)


def encode_with_pictures(
    planner: Planner,
    tokenizer: Any,
    config: MetaCanvasConfig,
    prompts: list[str],
    grid: tuple[int, int, int],
    pictures: Pictures,
) -> dict[str, Tensor]:
    """Keyword arguments of the planner for instructions that each come with the same pictures and clips.

    Positions are `get_rope_index`'s, with the canvas as one more picture at the end of the sequence.
    """
    qwen = planner.qwen
    tokens = {IMAGE: qwen.config.image_token_id, CLIP: qwen.config.video_token_id}
    merge = qwen.config.vision_config.spatial_merge_size
    text = {kind: tokenizer.convert_ids_to_tokens(token) for kind, token in tokens.items()}
    texts = [
        _expanded(chat_text(tokenizer, config, prompt, pictures.kinds), pictures, text, merge**2) for prompt in prompts
    ]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    position_ids, canvas = [], []
    for row in range(len(prompts)):
        both = _positions(planner, ids[row][mask[row].bool()], tokens, grid, pictures)
        length = int(mask[row].sum())
        position_ids.append(torch.nn.functional.pad(both[:, :length], (0, ids.shape[1] - length)))
        canvas.append(both[:, length:].unflatten(1, grid))
    vision, index, before = [], torch.full_like(ids, -1), 0
    for kind, token in tokens.items():
        if kind in pictures.patches:
            vision.append(planner.see(pictures.patches[kind].to(qwen.dtype), pictures.grid_thw[kind]))
            here = ids == token
            index = torch.where(here, here.cumsum(dim=1) - 1 + before, index)
            before += len(vision[-1])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.stack(position_ids, dim=1),
        "canvas_position_ids": torch.stack(canvas, dim=1),
        "vision": torch.cat(vision),
        "vision_index": index,
    }


def _positions(
    planner: Planner, ids: Tensor, tokens: dict[str, int], grid: tuple[int, int, int], pictures: Pictures
) -> Tensor:
    """Positions `[3, n + canvas]` of one sequence and its canvas."""
    merge = planner.qwen.config.vision_config.spatial_merge_size
    cells = math.prod(grid)
    canvas = torch.tensor([[grid[0], grid[1] * merge, grid[2] * merge]])
    kinds = (ids == tokens[IMAGE]).int() + 2 * (ids == tokens[CLIP]).int()
    positions, _ = planner.qwen.get_rope_index(
        torch.cat([ids, ids.new_full((cells,), tokens[IMAGE])])[None],
        mm_token_type_ids=torch.cat([kinds, kinds.new_ones(cells)])[None],
        image_grid_thw=torch.cat([pictures.grid_thw[IMAGE], canvas]) if IMAGE in pictures.grid_thw else canvas,
        video_grid_thw=pictures.grid_thw.get(CLIP),
        second_per_grid_ts=torch.tensor(pictures.seconds) if pictures.seconds else None,
    )
    found: Tensor = positions[:, 0]
    return found


def _expanded(text: str, pictures: Pictures, tokens: dict[str, str], merged: int) -> str:
    """The text with the token of every picture and clip repeated for each of its own, as `Qwen2_5_VLProcessor` does."""
    for kind, grids in pictures.grid_thw.items():
        for grid in grids:
            text = text.replace(tokens[kind], "\ue002" * (int(grid.prod()) // merged), 1)
        text = text.replace("\ue002", tokens[kind])
    return text


def _sampled(count: int, fps: float, depth: int, prompt: PromptConfig) -> list[int]:
    """Frames as `Qwen2VLVideoProcessor.sample_frames` takes them; a single one as it is."""
    limits = clip_limits(prompt)
    if limits["clip_fps"] is None or count < depth:
        return list(range(count))
    most = min(limits["max_frames"], count) // depth * depth
    number = min(max(count / fps * limits["clip_fps"], limits["min_frames"]), most, count)
    number = max(1, math.floor(number / depth) * depth)
    sampled: list[int] = torch.arange(0, count, count / number).int().tolist()
    return sampled[:number]  # rounding can give one more, behind the last frame


def _pillow(picture: Image.Image | np.ndarray) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.convert("RGB")
