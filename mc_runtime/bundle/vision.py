"""How the planner's pictures and clips become pixels and tokens: the part of a manifest that Qwen2.5-VL's processor says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Pictures and clips as Qwen2.5-VL reads them.

    Attributes:
        patch, temporal_patch: pixels along a side of a patch, and frames in it.
        merge: patches along a side of a token.
        window: pixels along a side of an attention window.
        image_pixels, clip_pixels: fewest and most pixels of a picture, and of a clip's frame, once resized.
        mean, std: of red, green and blue, in [0, 1].
        tokens_per_second: temporal positions a second of a clip takes.
        image_token_id, clip_token_id: the tokens that are repeated for a picture and for a clip.
        image_text, clip_text: what the chat template writes for one picture and one clip, their token in it once.
        clip_fps: frames a second that are taken of a clip; null for all its frames.
        min_frames, max_frames: of a clip, as taken.
        max_media: most pictures and clips of one prompt.
        max_tokens: most tokens of them all.
    """

    patch: int
    temporal_patch: int
    merge: int
    window: int
    image_pixels: tuple[int, int]
    clip_pixels: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    tokens_per_second: float
    image_token_id: int
    clip_token_id: int
    image_text: str
    clip_text: str
    clip_fps: float | None
    min_frames: int
    max_frames: int
    max_media: int
    max_tokens: int

    def __post_init__(self) -> None:
        sizes = ("patch", "temporal_patch", "merge", "window", "min_frames", "max_frames", "max_media", "max_tokens")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.window % self.factor:
            raise ValueError(f"window: {self.window} is no multiple of a token's side, {self.factor} pixels")
        for name in ("image_pixels", "clip_pixels"):
            least, most = getattr(self, name)
            if not 1 <= least <= most or most < self.factor**2:
                raise ValueError(f"{name}: expected the least and the most, of at least one token's {self.factor**2} pixels")
        if min(self.std) <= 0:
            raise ValueError("std: expected numbers above 0")
        if self.tokens_per_second <= 0 or (self.clip_fps is not None and self.clip_fps <= 0):
            raise ValueError("tokens_per_second, clip_fps: expected numbers above 0")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames: {self.min_frames} is more than max_frames, {self.max_frames}")
        if self.image_token_id == self.clip_token_id or min(self.image_token_id, self.clip_token_id) < 0:
            raise ValueError("image_token_id, clip_token_id: expected two tokens")

    @property
    def factor(self) -> int:
        """Pixels along a token's side; resized pictures have multiples of it."""
        return self.patch * self.merge

    @property
    def patches_per_token(self) -> int:
        """Spatial patches that are merged into a token."""
        return self.merge**2

    @property
    def patch_values(self) -> int:
        """Numbers of a patch: channels, frames, rows, columns."""
        return 3 * self.temporal_patch * self.patch**2

    @property
    def window_tokens(self) -> int:
        """Tokens along a side of an attention window."""
        return self.window // self.factor
