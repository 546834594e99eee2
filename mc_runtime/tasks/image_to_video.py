"""Image to video: a picture as the first frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.tasks.checks import checked_number, whole_number
from mc_runtime.tasks.inputs import one_picture
from mc_runtime.tasks.request import VideoRequest

if TYPE_CHECKING:
    from PIL import Image

# Stable Video Diffusion's own defaults.
MOTION_BUCKET = 127
NOISE_AUGMENTATION = 0.02


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageToVideo(VideoRequest):
    """Videos that begin with a picture.

    Attributes:
        image: the first frame, RGB.
        motion_bucket: how much moves, for a model that is told (0 to 255).
        noise_augmentation: standard deviation of the noise on the picture, for a model that is told.
    """

    task: ClassVar[str] = "image-to-video"
    media: ClassVar[tuple[str, ...]] = ("image",)

    image: Image.Image
    motion_bucket: int
    noise_augmentation: float

    @classmethod
    def own_fields(cls, manifest: Manifest, **own: Any) -> dict[str, Any]:
        """The picture, and how it should move."""
        return {
            "image": one_picture(cls.task, own.pop("image", None)),
            "motion_bucket": whole_number("motion_bucket", own.pop("motion_bucket", MOTION_BUCKET), 0, 255),
            "noise_augmentation": checked_number(
                "noise_augmentation", own.pop("noise_augmentation", NOISE_AUGMENTATION), 0, 10
            ),
            **super().own_fields(manifest, **own),
        }

    @property
    def pictures(self) -> tuple[Image.Image, ...]:
        return (self.image,)
