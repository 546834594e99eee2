"""Video editing: a video, changed as the prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.tasks.inputs import one_clip
from mc_runtime.tasks.request import VideoRequest

if TYPE_CHECKING:
    from mc_runtime.media.clip import Clip


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoEditing(VideoRequest):
    """Edits of one video.

    Attributes:
        video: the clip, resampled to the request's frames a second and cut to its frames.
    """

    task: ClassVar[str] = "video-editing"
    media: ClassVar[tuple[str, ...]] = ("video",)

    video: Clip

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """The clip; without `frames`, as many of its frames as the bundle serves."""
        video, asked = own.pop("video", None), own.get("frames")
        fields = super().own_fields(manifest, **own)
        clip, frames = one_clip(cls.task, manifest, video, fields["fps"], asked)
        return {**fields, "frames": frames, "video": clip}

    @property
    def clip(self) -> Clip:
        return self.video
