"""Pictures and clips that a request is given, opened and bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.errors import RequestError
from mc_runtime.tasks.checks import checked_frames

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip

MAX_PICTURES = 16


def one_picture(task: str, image: Any) -> Image.Image:
    """The one picture of a task that takes one. Raises RequestError."""
    pictures = several_pictures(task, image)
    if len(pictures) != 1:
        raise RequestError(f"{task} takes one image, got {len(pictures)}")
    return pictures[0]


def several_pictures(task: str, image: Any) -> tuple[Image.Image, ...]:
    """A picture or a list of them, as paths, Pillow images or arrays, opened as RGB. Raises RequestError."""
    from mc_runtime.media.image_input import load_image

    if image is None:
        raise RequestError(f"{task} needs an image; give image=... (--image FILE)")
    given: Sequence[Any] = image if isinstance(image, (list, tuple)) else [image]
    if not 1 <= len(given) <= MAX_PICTURES:
        raise RequestError(f"{task} takes 1 to {MAX_PICTURES} images, got {len(given)}")
    return tuple(load_image(one) for one in given)


def one_clip(task: str, manifest: Manifest, video: Any, fps: float, frames: Any) -> tuple[Clip, int]:
    """A video, as a path, a folder of frames or arrays, at `fps`, and how many of its frames are used.

    Without `frames`, that is the most that the bundle serves and the clip has.
    """
    from mc_runtime.media.clip import Clip
    from mc_runtime.media.clip_input import load_clip

    served = manifest.frames
    assert served is not None
    if video is None:
        raise RequestError(f"{task} needs a video; give video=... (--video FILE)")
    wanted = checked_frames(served, frames) if frames is not None else served.max
    clip = load_clip(video, fps=fps, max_frames=wanted)
    there = len(clip.frames)
    if frames is not None and there < wanted:
        raise RequestError(
            f"the video has {there} frames at {fps:g} a second, fewer than the {wanted} asked for; ask for fewer"
        )
    usable = served.first + max(0, there - served.first) // served.multiple * served.multiple
    if not served.serves(usable) or usable > there:
        raise RequestError(f"the video has {there} frames at {fps:g} a second; at least {served.first} are needed")
    return Clip(clip.frames[:usable], clip.fps), usable
