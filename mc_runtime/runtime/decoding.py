"""From latents to pictures and videos, one at a time: the decoder's memory at full resolution is a multiple of the loop's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Shapes
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.runtime.clips import Codec, decode_clip
from mc_runtime.runtime.engines import Engines, fixed
from mc_runtime.runtime.work import Work
from mc_runtime.tasks.request import Request, VideoRequest

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.media.clip import Clip


class Decoding:
    """Decodes the latents of one bundle."""

    def __init__(self, manifest: Manifest, engines: Engines) -> None:
        self._manifest = manifest
        self._engines = engines

    def shapes(self, request: Request) -> dict[str, Shapes]:
        """The engines it will run for a request, with the shapes of their inputs."""
        if isinstance(request, VideoRequest):
            return {}
        count = fixed(self._manifest.engines["vae_decoder"], "latents", 0) or 1
        return {"vae_decoder": {"latents": (count, *request.latent_shape)}}

    def decode(self, latents: NDArray[np.float32], request: Request, work: Work) -> list[Image.Image | Clip]:
        """Pictures, or videos, of a batch `[B, C, (T,) H, W]`."""
        if isinstance(request, VideoRequest):
            return [self._clip(one, request.fps, work) for one in latents]
        return [picture for one in latents for picture in self._pictures(one, work)]

    @property
    def components(self) -> tuple[str, ...]:
        """The engines it runs."""
        return tuple(name for name in ("vae_decoder", "vae_decoder_next") if name in self._manifest.engines)

    def _pictures(self, latents: NDArray[np.float32], work: Work) -> list[Image.Image]:
        from mc_runtime.media.images import pixels_to_images

        decoder = self._engines.get("vae_decoder")
        work.stop_if_cancelled()
        with work.stopwatch.stage("decode"):
            inputs = np.repeat(latents[None], fixed(decoder.spec, "latents", 0) or 1, axis=0)
            pixels = decoder.run({"latents": inputs}, work.clock)["pixels"][:1]
        with work.stopwatch.stage("pixels"):
            return pixels_to_images(pixels)

    def _clip(self, latents: NDArray[np.float32], fps: float, work: Work) -> Clip:
        """Chunk by chunk: pixels become bytes as they come, so that only one chunk of them is ever held as floats."""
        from mc_runtime.media.clip import Clip
        from mc_runtime.media.images import pixels_to_bytes

        codec = Codec(*(self._engines.get(name) for name in self.components))
        frames: list[NDArray[np.uint8]] = []
        chunks = iter(decode_clip(codec, latents[None], work.clock, work))
        while True:
            with work.stopwatch.stage("decode"):
                pixels = next(chunks, None)
            if pixels is None:
                return Clip(np.concatenate(frames), fps)
            with work.stopwatch.stage("pixels"):
                frames.append(pixels_to_bytes(pixels[0]))

    @staticmethod
    def sorted(made: Sequence[Image.Image | Clip]) -> tuple[list[Image.Image], list[Clip]]:
        """Pictures and videos apart."""
        from PIL import Image

        pictures = [one for one in made if isinstance(one, Image.Image)]
        return pictures, [one for one in made if not isinstance(one, Image.Image)]
