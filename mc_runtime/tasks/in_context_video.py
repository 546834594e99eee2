"""In-context video: reference pictures whose subjects appear in the video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.tasks.inputs import several_pictures
from mc_runtime.tasks.request import VideoRequest

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False, kw_only=True)
class InContextVideo(VideoRequest):
    """Videos of what reference pictures show.

    Attributes:
        images: the references, RGB, in the order the prompt speaks of them.
    """

    task: ClassVar[str] = "in-context-video"
    media: ClassVar[tuple[str, ...]] = ("image",)

    images: tuple[Image.Image, ...]

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """The references."""
        return {"images": several_pictures(cls.task, own.pop("image", None)), **super().own_fields(manifest, **own)}

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        return self.images
