"""``metacanvas.json``: what a MetaCanvas checkpoint says beyond its weights (see docs/checkpoint.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from mc_runtime.errors import CheckpointError

METACANVAS_FILE = "metacanvas.json"
# What Qwen2.5-VL was trained to read; masks grow with the square of it.
LONGEST_PROMPT = 32768
Task = Literal["text-to-image", "image-editing", "text-to-video", "image-to-video", "video-editing", "in-context-video"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CanvasConfig(_Strict):
    """The canvas: the learned grid (t, h, w), and how many pixels of the output one token stands for along h and w."""

    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    pixels_per_token: PositiveInt

    def grid_at(self, height: int, width: int) -> tuple[int, int, int]:
        """The canvas grid (t, h, w) of an output of ``height`` x ``width`` pixels; it follows the resolution (section 3.3)."""
        per_token = self.pixels_per_token
        return (self.grid[0], -(-height // per_token), -(-width // per_token))


class ContextConnectorConfig(_Strict):
    """The two-layer MLP; ``hidden_dim`` defaults to 4 x the context width."""

    hidden_dim: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class CanvasConnectorConfig(_Strict):
    """The vanilla block's head width and the DiT block's Mix-FFN expansion."""

    plan_head_dim: PositiveInt = 32
    mlp_ratio: PositiveFloat = 2.5


class PromptConfig(_Strict):
    """The instruction's limit in tokens, the token that closes it (default: the tokenizer's EOS), prompts to calibrate on.

    And its pictures and clips: tokens of a picture and of a clip's temporal patch (None: as the processor's pixel limits have
    it), frames a second and at most that are taken of a clip, and how many pictures, clips and tokens of theirs there may be.
    """

    max_tokens: Annotated[int, Field(gt=0, le=LONGEST_PROMPT)] = 512
    end_token: str | None = None
    calibration: tuple[str, ...] = ()
    image_tokens: PositiveInt | None = None
    frame_tokens: PositiveInt | None = None
    clip_fps: PositiveFloat | None = 2.0
    max_frames: PositiveInt = 768
    max_media: PositiveInt = 16
    max_vision_tokens: Annotated[int, Field(gt=0, le=LONGEST_PROMPT)] = 4096


class DefaultsConfig(_Strict):
    """What a request gets that does not say; None leaves it to the backbone's kind. ``frames`` and ``fps`` are of videos."""

    steps: PositiveInt | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    frames: PositiveInt | None = None
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class MetaCanvasConfig(_Strict):
    """The whole of ``metacanvas.json``."""

    format_version: Literal[1] = 1
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] = ("text-to-image",)
    conditioning: Literal["planner", "text_encoder"] = "planner"
    canvas: CanvasConfig
    context_connector: ContextConnectorConfig = ContextConnectorConfig()
    canvas_connector: CanvasConnectorConfig = CanvasConnectorConfig()
    prompt: PromptConfig = PromptConfig()
    defaults: DefaultsConfig = DefaultsConfig()

    @property
    def reads_pictures(self) -> bool:
        """Whether the planner is given pictures or clips: all tasks but those from text alone (section 3.1)."""
        return any(not task.startswith("text-to-") for task in self.tasks)


def load_config(folder: Path, name: str = METACANVAS_FILE) -> MetaCanvasConfig | None:
    """Reads ``metacanvas.json``; None where the folder is a stock pipeline.

    Raises:
        CheckpointError: the file is no JSON, or a key is unknown, missing or of the wrong kind; the message names it.
    """
    file = folder / name
    if not file.exists():
        return None
    try:
        return MetaCanvasConfig.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([str(file), *filter(None, [".".join(map(str, first["loc"]))])])
        raise CheckpointError(f"{where}: {first['msg']} (see docs/checkpoint.md)") from error


def save_config(config: MetaCanvasConfig, folder: Path) -> None:
    """Writes ``metacanvas.json``."""
    (folder / METACANVAS_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
