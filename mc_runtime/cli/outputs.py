"""The files of one `mc-runtime generate`: named and checked before any work is done, written when it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip
    from mc_runtime.runtime.result import Result


@dataclass(frozen=True)
class Outputs:
    """Where the results of one request go.

    Attributes:
        results: one file a picture, or a video.
        canvas_map: the layout the planner drew.
        sheet: all results side by side.
        comparison: the input beside the first result.
        of_videos: whether the results are videos.
        tasks: what the bundle can do.
    """

    results: tuple[Path, ...]
    canvas_map: Path | None = None
    sheet: Path | None = None
    comparison: Path | None = None
    of_videos: bool = False
    tasks: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that will be written."""
        return (*self.results, *(path for path in (self.canvas_map, self.sheet, self.comparison) if path is not None))

    def check(self) -> None:
        """Raise OutputError where two files have one name, or one cannot be written."""
        if len(set(self.all)) != len(self.all):
            raise OutputError(
                f"{self.results[0]}: two outputs have the same name; give --canvas-map, --sheet and --comparison names of "
                "their own"
            )
        for path in (*self.results, *([self.sheet] if self.sheet else [])):
            self._check_kind(path)
            check_output(path, clip=self.of_videos)
        if self.canvas_map is not None:
            check_output(self.canvas_map)
        if self.comparison is not None:
            check_output(self.comparison, clip=True)

    def _check_kind(self, path: Path) -> None:
        """Raise OutputError for a clip's name where the bundle makes pictures, or the other way round."""
        from mc_runtime.media.clip_output import CLIP_FORMATS
        from mc_runtime.media.images import FORMATS

        mine, other = (CLIP_FORMATS, FORMATS) if self.of_videos else (FORMATS, CLIP_FORMATS)
        suffix = path.suffix.lower()
        if suffix in other and suffix not in mine:
            made, missed = ("videos", "picture") if self.of_videos else ("pictures", "video")
            raise OutputError(
                f"{path}: the name of a {missed}, but this bundle makes {made} ({', '.join(self.tasks)}); "
                f"end the name in one of {', '.join(mine)}"
            )


def results_of(output: Path, num_images: int) -> tuple[Path, ...]:
    """One name a result: `output` itself, or with several `out-0.png`, `out-1.png` and so on. Raises RequestError."""
    from mc_runtime.tasks.checks import MAX_IMAGES

    if not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"num_images must be a whole number from 1 to {MAX_IMAGES}, got {num_images}")
    if num_images == 1:
        return (output,)
    return tuple(output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(num_images))


def check_output(path: Path, *, clip: bool = False) -> None:
    """Whether a picture, or a clip, can be written at `path`: its suffix, its directory, and no directory of that name."""
    if clip:
        from mc_runtime.media.clip_output import CLIP_FORMATS

        if path.suffix and path.suffix.lower() not in CLIP_FORMATS:
            known = ", ".join(CLIP_FORMATS)
            raise OutputError(f"{path}: no clip format that is known; end the name in one of {known}, or in none for a folder")
    else:
        from mc_runtime.media.images import FORMATS

        if path.suffix.lower() not in FORMATS:
            raise OutputError(f"{path}: no picture format that is known; end the name in one of {', '.join(FORMATS)}")
    from mc_runtime.media.files import check_writable

    check_writable(path, folder=clip and not path.suffix)


def write_outputs(result: Result, outputs: Outputs, story: dict[str, Any] | None, given: Image.Image | Clip | None) -> None:
    """Write every result with `story` and its own seed inside, or with nothing, and what was asked for beside them.

    `given` is the input picture or clip, for the comparison. Raises OutputError.
    """
    made: Sequence[Image.Image | Clip] = result.clips or result.images
    for one, seed, path in zip(made, result.seeds, outputs.results, strict=True):
        _save(one, path, None if story is None else {**story, "seed": seed})
    if outputs.canvas_map is not None:
        _save(result.plan.canvas_map(), outputs.canvas_map, story)
    if outputs.sheet is not None:
        from mc_runtime.media.sheet import clip_sheet, contact_sheet

        captions = [f"seed {seed}" for seed in result.seeds]
        sheet = clip_sheet(result.clips, captions) if result.clips else contact_sheet(result.images, captions)
        _save(sheet, outputs.sheet, story)
    if outputs.comparison is not None and given is not None:
        from mc_runtime.media.comparison import comparison

        _save(comparison(given, made[0]), outputs.comparison, story)


def _save(one: Image.Image | Clip, path: Path, story: dict[str, Any] | None) -> None:
    from PIL import Image

    from mc_runtime.media.clip_output import save_clip
    from mc_runtime.media.images import save_image

    if isinstance(one, Image.Image):
        save_image(one, path, story)
    else:
        save_clip(one, path, story)
