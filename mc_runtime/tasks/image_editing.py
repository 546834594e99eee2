"""Image editing: a picture, changed as the prompt says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.tasks.inputs import one_picture
from mc_runtime.tasks.request import Request

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageEditing(Request):
    """Edits of one picture.

    Attributes:
        image: the picture, RGB; the planner sees it, and the denoiser gets its latents.
    """

    task: ClassVar[str] = "image-editing"
    media: ClassVar[tuple[str, ...]] = ("image",)

    image: Image.Image

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """The picture."""
        return {"image": one_picture(cls.task, own.pop("image", None)), **super().own_fields(manifest, **own)}

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        return (self.image,)
