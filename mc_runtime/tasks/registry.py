"""From arguments to a request: the task that was named, or the one that the inputs speak for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.errors import RequestError
from mc_runtime.tasks.image_editing import ImageEditing
from mc_runtime.tasks.image_to_video import ImageToVideo
from mc_runtime.tasks.in_context_video import InContextVideo
from mc_runtime.tasks.request import Request
from mc_runtime.tasks.text_to_image import TextToImage
from mc_runtime.tasks.text_to_video import TextToVideo
from mc_runtime.tasks.video_editing import VideoEditing

#: In the order in which a task is guessed.
TASKS: dict[str, type[Request]] = {
    kind.task: kind for kind in (TextToImage, ImageEditing, TextToVideo, ImageToVideo, InContextVideo, VideoEditing)
}
_MEDIA = ("image", "video")


def request_for(manifest: Manifest, task: str | None = None, **arguments: Any) -> Request:
    """The request, of the named task or the one guessed from the media given.

    Arguments that are None count as not given.

    Raises:
        RequestError: the bundle cannot do it; the message names what it can.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    return task_for(manifest.tasks, task, given).from_arguments(manifest, **given)


def task_for(tasks: Sequence[str], task: str | None, given: Mapping[str, Any]) -> type[Request]:
    """The named task of those that can be done, or the one that the media given (`image`, `video`) speak for.

    Raises:
        RequestError: none of them; the message names them.
    """
    if task is None:
        return _guessed(tasks, given)
    if not isinstance(task, str) or task not in TASKS:
        raise RequestError(f"task {task!r} is unknown; this bundle can do {', '.join(tasks)}")
    if task not in tasks:
        raise RequestError(f"this bundle cannot do {task}; it can do {', '.join(tasks)}")
    return TASKS[task]


def default_request(manifest: Manifest, **arguments: Any) -> Request | None:
    """A request that needs nothing but a prompt, or None where every task of the bundle needs a picture or a video."""
    kind = next((TASKS[name] for name in manifest.tasks if name in TASKS and not TASKS[name].media), None)
    return None if kind is None else kind.from_arguments(manifest, **arguments)


def _guessed(tasks: Sequence[str], given: Mapping[str, Any]) -> type[Request]:
    media = tuple(name for name in _MEDIA if name in given)
    able = [TASKS[name] for name in TASKS if name in tasks]
    fitting = [kind for kind in able if kind.media == media]
    if len(fitting) > 1 and isinstance(given.get("image"), (list, tuple)) and len(given["image"]) > 1:
        fitting = [kind for kind in fitting if kind is InContextVideo] or fitting
    if fitting:
        return fitting[0]
    what = f"with {' and '.join(media)}" if media else "from a prompt alone"
    can = "; ".join(f"{kind.task} (needs {' and '.join(kind.media) or 'a prompt alone'})" for kind in able)
    raise RequestError(f"this bundle can do nothing {what}; it can do {can}")
