"""From latents to pictures and videos, one at a time: the decoder's memory at full resolution is a multiple of the loop's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Shapes
from mc_runtime.bundle.manifest import Manifest
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
        count = fixed(self._manifest.engines["vae_decoder"], "latents", 0) or 1
        return {"vae_decoder": {"latents": (count, *request.latent_shape)}}

    def decode(self, latents: NDArray[np.float32], request: Request, work: Work) -> list[Image.Image | Clip]:
        """Pictures, or videos, of a batch `[B, C, (T,) H, W]`."""
        from mc_runtime.media.images import pixels_to_images

        decoder = self._engines.get("vae_decoder")
        made: list[Image.Image | Clip] = []
        for one in latents:
            work.stop_if_cancelled()
            with work.stopwatch.stage("decode"):
                inputs = np.repeat(one[None], fixed(decoder.spec, "latents", 0) or 1, axis=0)
                pixels = decoder.run({"latents": inputs}, work.clock)["pixels"][:1]
            with work.stopwatch.stage("pixels"):
                if isinstance(request, VideoRequest):
                    from mc_runtime.media.clip import pixels_to_clips

                    made += pixels_to_clips(pixels, request.fps)
                else:
                    made += pixels_to_images(pixels)
        return made

    @staticmethod
    def sorted(made: Sequence[Image.Image | Clip]) -> tuple[list[Image.Image], list[Clip]]:
        """Pictures and videos apart."""
        from PIL import Image

        pictures = [one for one in made if isinstance(one, Image.Image)]
        return pictures, [one for one in made if not isinstance(one, Image.Image)]
