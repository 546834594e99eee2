"""From pictures to latents: the `vae_encoder` engine, once for each content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mc_runtime.backends.base import Array
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.runtime.engines import EngineClock, Engines, fixed
from mc_runtime.runtime.plan import ContentCache

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 64 * 2**20


class Encoding:
    """Encodes the pictures of requests and keeps what it gave."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._cache = ContentCache(CACHE_BYTES)

    def picture_encoder(self, clock: EngineClock) -> Callable[[Array], Array]:
        """Pixels f32 `[h, w, 3]` in [0, 1] to latents `[C, H, W]`, or `[C, 1, H, W]` where the autoencoder is a video's."""

        def encode(pixels: Array) -> Array:
            key = hashlib.sha256(pixels.tobytes()).digest() + bytes(str(pixels.shape), "ascii")
            latents: Array = self._cache.get_or_make(key, lambda: self._run(pixels, clock))
            return latents

        return encode

    def _run(self, pixels: Array, clock: EngineClock) -> Array:
        encoder = self._engines.get("vae_encoder")
        tensor = encoder.spec.input("pixels")
        of_video = tensor is not None and len(tensor.shape) == 5
        rows = pixels[None, None] if of_video else pixels[None]
        rows = np.repeat(rows, fixed(encoder.spec, "pixels", 0) or 1, axis=0)
        return np.array(encoder.run({"pixels": np.ascontiguousarray(rows, np.float32)}, clock)["latents"][0])


def reference_size(manifest: Manifest, picture: Image.Image) -> tuple[int, int]:
    """The served (height, width) whose proportions are nearest to the picture's; of equals, the narrowest."""
    proportion = picture.width / picture.height
    return min(manifest.reference_sizes, key=lambda size: (abs(proportion - size[1] / size[0]), size[1], size[0]))
