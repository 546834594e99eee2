"""From pictures and clips to latents: the autoencoder's encoder engines, once for each content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mc_runtime.backends.base import Array
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.runtime.clips import Codec, encode_clip
from mc_runtime.runtime.engines import Engines, fixed
from mc_runtime.runtime.plan import ContentCache
from mc_runtime.runtime.work import Work

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 64 * 2**20


class Encoding:
    """Encodes the pictures and clips of requests and keeps what it gave."""

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self._engines = engines
        self._cache = ContentCache(CACHE_BYTES)
        #: The engines it needs.
        self.components = tuple(name for name in ("vae_encoder", "vae_encoder_next") if name in manifest.engines)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache = ContentCache(CACHE_BYTES)

    def encoder(self, work: Work) -> Callable[[Array], Array]:
        """Pixels f32 in [0, 1] to latents: `[h, w, 3]` to `[C, H, W]`, and a clip's `[F, h, w, 3]` to `[C, T, H, W]`."""

        def encode(pixels: Array) -> Array:
            key = (pixels.shape, hashlib.sha256(pixels.tobytes()).digest())
            run = self._picture if pixels.ndim == 3 else self._clip
            latents: Array = self._cache.get_or_make(key, lambda: run(pixels, work))
            return latents

        return encode

    def _picture(self, pixels: Array, work: Work) -> Array:
        work.stop_if_cancelled()
        encoder = self._engines.get("vae_encoder")
        rows = np.repeat(pixels[None], fixed(encoder.spec, "pixels", 0) or 1, axis=0)
        return np.array(encoder.run({"pixels": np.ascontiguousarray(rows, np.float32)}, work.clock)["latents"][0])

    def _clip(self, pixels: Array, work: Work) -> Array:
        codec = Codec(*(self._engines.get(name) for name in self.components))
        frames = (np.ascontiguousarray(frame[None], np.float32) for frame in pixels)
        return np.array(encode_clip(codec, frames, work.clock, work)[0])


def reference_size(manifest: Manifest, picture: Image.Image) -> tuple[int, int]:
    """The served (height, width) whose proportions are nearest to the picture's; of equals, the narrowest."""
    proportion = picture.width / picture.height
    return min(manifest.reference_sizes, key=lambda size: (abs(proportion - size[1] / size[0]), size[1], size[0]))
