"""How a checkpoint's planner reads pictures and clips, frozen into the manifest: sizes, normalisation, tokens, limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.source import read_json
from mc_export.model.config import PromptConfig
from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import CheckpointError

SENTINEL = "\ue000prompt\ue001"
"""Stands for the prompt while a chat template is rendered: private-use characters that no template contains."""
MIN_FRAMES = 4
"""Fewest frames that are taken of a clip which has them, as in Qwen's own processing."""
# Where transformers looks for a video processor's settings, the first that is there, and what it takes where none says sizes.
_CLIP_SETTINGS = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
_CLIP_PIXELS = (128 * 28 * 28, 768 * 28 * 28)


def rendered(processor: Any, prompt: str, media: Sequence[str] = ()) -> str:
    """A user's turn in the checkpoint's chat template: pictures and clips (`image` or `video`), then the prompt.

    Raises:
        CheckpointError: there is no chat template.
    """
    content = [*({"type": kind} for kind in media), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    try:
        return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    except ValueError as error:
        raise CheckpointError("processor/: there is no chat template; add chat_template.jinja") from error


def planner_vision(checkpoint: Checkpoint) -> Vision | None:
    """What the manifest says of pictures and clips; None where no task of the checkpoint has any.

    Raises:
        CheckpointError: image processor, planner and chat template do not agree, or the processor is of another kind.
    """
    config = checkpoint.config
    if config is None or not config.reads_pictures:
        return None
    planner = checkpoint.load_planner_config()
    images = checkpoint.load_image_processor()
    tokenizer = checkpoint.load_planner_tokenizer()
    _check(images, planner.vision_config)
    image_pixels, clip_pixels = pixel_limits(checkpoint, images)
    tower = planner.vision_config
    try:
        return Vision(
            patch=tower.patch_size,
            temporal_patch=tower.temporal_patch_size,
            merge=tower.spatial_merge_size,
            window=tower.window_size,
            image_pixels=image_pixels,
            clip_pixels=clip_pixels,
            mean=tuple(images.image_mean),
            std=tuple(images.image_std),
            tokens_per_second=float(tower.tokens_per_second),
            image_token_id=planner.image_token_id,
            clip_token_id=planner.video_token_id,
            image_text=_written(tokenizer, "image", planner.image_token_id),
            clip_text=_written(tokenizer, "video", planner.video_token_id),
            **clip_limits(config.prompt),
            max_media=config.prompt.max_media,
            max_tokens=config.prompt.max_vision_tokens,
        )
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: pictures cannot be read with these settings ({error})") from error


def clip_limits(prompt: PromptConfig) -> dict[str, Any]:
    """Which frames of a clip are taken: `clip_fps`, `min_frames` and `max_frames`."""
    return {
        "clip_fps": prompt.clip_fps,
        "min_frames": min(MIN_FRAMES, prompt.max_frames),
        "max_frames": prompt.max_frames,
    }


def pixel_limits(checkpoint: Checkpoint, images: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fewest and most pixels of a resized picture, and of a clip's frame: from `metacanvas.json`, else the processor's."""
    assert checkpoint.config is not None
    prompt = checkpoint.config.prompt
    factor = images.patch_size * images.merge_size

    def of_tokens(tokens: int | None, otherwise: tuple[int, int]) -> tuple[int, int]:
        return otherwise if tokens is None else (tokens * factor**2, tokens * factor**2)

    image = (int(images.size["shortest_edge"]), int(images.size["longest_edge"]))
    return of_tokens(prompt.image_tokens, image), of_tokens(prompt.frame_tokens, _clip_pixels(checkpoint.path / "processor"))


def _clip_pixels(folder: Path) -> tuple[int, int]:
    for name, key in _CLIP_SETTINGS:
        if not (folder / name).is_file():
            continue
        settings = read_json(folder / name)
        settings = settings.get(key) if key else settings
        if isinstance(settings, dict):
            size = settings.get("size") or {}
            least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
            most = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
            return int(least or _CLIP_PIXELS[0]), int(most or _CLIP_PIXELS[1])
    return _CLIP_PIXELS


def _check(images: Any, tower: Any) -> None:
    """The image processor is of Qwen2.5-VL's kind and of this tower's sizes."""
    wanted = {
        "patch_size": tower.patch_size,
        "merge_size": tower.spatial_merge_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "resample": Image.Resampling.BICUBIC,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    for name, value in wanted.items():
        if getattr(images, name, None) != value:
            raise CheckpointError(
                f"processor/preprocessor_config.json: {name} is {getattr(images, name, None)!r}, this planner needs {value!r}"
            )
    if tower.in_channels != 3:
        raise CheckpointError(f"planner/config.json: vision_config.in_channels is {tower.in_channels}, must be 3")


def _written(tokenizer: Any, kind: str, token_id: int) -> str:
    """What the chat template writes before the prompt for one picture or clip, its token in it once."""
    plain = rendered(tokenizer, SENTINEL)
    before = plain.partition(SENTINEL)[0]
    text = rendered(tokenizer, SENTINEL, [kind])
    extra = text[len(before) : len(before) + len(text) - len(plain)]
    token = tokenizer.convert_ids_to_tokens(token_id)
    if not token or extra.count(token) != 1 or plain.replace(SENTINEL, extra + SENTINEL) != text:
        raise CheckpointError(f"processor/: the chat template must write {token!r} once for each {kind}, before the prompt")
    return extra
