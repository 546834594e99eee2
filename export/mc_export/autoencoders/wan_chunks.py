"""The four graphs of AutoencoderKLWan: decoder and encoder, each for a clip's first chunk and for every next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from mc_export.autoencoders.base import Autoencoder, Reach
from mc_export.autoencoders.pictures import unit_pixels
from mc_export.program.base import Axis, Extents, Program, float_tensor, shape_of
from mc_runtime.bundle.manifest import Tensor as TensorSpec

# Sides of the smallest latent frame whose caches tell their strides.
_PROBE = 2


class Cache(NamedTuple):
    """What one causal convolution keeps of a chunk: `frames` of `channels`, at `scale` cells a latent cell."""

    channels: int
    frames: int
    scale: int

    def spec(self, name: str) -> TensorSpec:
        """It as a tensor `[B, channels, frames, scale * H, scale * W]`."""
        sides = [side if self.scale == 1 else f"{self.scale}*{side}" for side in "HW"]
        return float_tensor(name, "B", self.channels, self.frames, *sides)

    def fit(self, kept: Tensor | None, chunk: Tensor) -> Tensor:
        """What was kept, filled up with zero frames in front: what the convolution pads a clip's start with.

        ``None`` stands for nothing but those; ``chunk`` `[B, C, T, H, W]` gives batch and latent size.
        """
        if kept is None:
            batch, _, _, height, width = chunk.shape
            return chunk.new_zeros(batch, self.channels, self.frames, height * self.scale, width * self.scale)
        return functional.pad(kept, (0, 0, 0, 0, self.frames - kept.shape[2], 0))


class _ChunkProgram(Program):
    """Shared by both directions: the caches in and out.

    `first` is the graph of a clip's first chunk: it takes no caches. Inputs `cache_00`, ... of the next chunk are the outputs
    `next_cache_00`, ... of the one before it, whichever graph it ran through.
    """

    caches: tuple[Cache, ...]

    def _declare(self, taken: TensorSpec, given: TensorSpec, reach: Reach, *, first: bool) -> None:
        named = [(f"cache_{index:02d}", cache) for index, cache in enumerate(self.caches)]
        self.inputs = (taken, *([] if first else [cache.spec(name) for name, cache in named]))
        self.outputs = (given, *(cache.spec(f"next_{name}") for name, cache in named))
        most = max(8, reach.max_cells)
        self.axes = {"B": Axis("B", 1, max(2, reach.max_batch), 2), "H": Axis("H", 2, most, 4), "W": Axis("W", 2, most, 3)}

    def _kept(self, caches: dict[str, Tensor]) -> list[Any]:
        """The model's list of caches before a chunk: in a first one, empty."""
        return [caches.get(f"cache_{index:02d}") for index in range(len(self.caches))]

    def _next(self, kept: Sequence[Tensor | str | None], latent: Tensor) -> tuple[Tensor, ...]:
        """The model's caches after a chunk as outputs; ``latent`` gives batch and latent size."""
        tensors = [cache if isinstance(cache, Tensor) else None for cache in kept]
        return tuple(cache.fit(tensor, latent) for cache, tensor in zip(self.caches, tensors, strict=True))

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Standard normal latents, uniform pixels; caches of the size that normed activations have."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {spec.name: torch.randn(shape_of(spec, extents), generator=generator) for spec in self.inputs}
        if "pixels" in drawn:
            drawn["pixels"] = torch.rand(drawn["pixels"].shape, generator=generator)
        return drawn


class WanDecoderProgram(_ChunkProgram):
    """`latents` `[B, C, 1, H, W]` as denoised, to `pixels` `[B, F, h, w, 3]` in [0, 1]: one frame first, then `F` each."""

    def __init__(self, autoencoder: Autoencoder, vae: Any, reach: Reach, *, first: bool) -> None:
        super().__init__()
        self.component = "vae_decoder" if first else "vae_decoder_next"
        self.first = first
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        self.patch = vae.config.patch_size or 1
        self.scaling = autoencoder.scaling(vae.config)
        strides, channels = autoencoder.strides(vae.config), autoencoder.latent_channels(vae.config)
        latent = torch.empty(1, channels, 1, _PROBE, _PROBE)
        self.caches = _caches(vae.decoder, (latent, latent), first_chunk=True)
        taken = float_tensor("latents", "B", channels, 1, "H", "W")
        sides = [f"{strides.space}*{side}" for side in "HW"]
        self._declare(taken, float_tensor("pixels", "B", 1 if first else strides.time, *sides, 3), reach, first=first)

    def forward(self, latents: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        kept = self._kept(caches)
        values = self.post_quant_conv(self.scaling.values(latents))
        options = {"first_chunk": True} if self.first else {}
        image = unpatchify(self.decoder(values, feat_cache=kept, feat_idx=[0], **options), patch_size=self.patch)
        return (unit_pixels(image), *self._next(kept, latents))


class WanEncoderProgram(_ChunkProgram):
    """`pixels` `[B, F, h, w, 3]` in [0, 1], one frame first and then `F` each, to `latents` `[B, C, 1, H, W]`: the
    distribution's mode, in the backbone's scale."""

    def __init__(self, autoencoder: Autoencoder, vae: Any, reach: Reach, *, first: bool) -> None:
        super().__init__()
        self.component = "vae_encoder" if first else "vae_encoder_next"
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.patch = vae.config.patch_size or 1
        self.scaling = autoencoder.scaling(vae.config) if reach.scale_encoded else None
        self.strides = autoencoder.strides(vae.config)
        channels, space = autoencoder.latent_channels(vae.config), self.strides.space
        side = _PROBE * space // self.patch
        chunks = [torch.empty(1, vae.config.in_channels, frames, side, side) for frames in (1, self.strides.time)]
        self.caches = _caches(vae.encoder, chunks)
        pixels = ("B", 1 if first else self.strides.time, f"{space}*H", f"{space}*W", 3)
        self._declare(float_tensor("pixels", *pixels), float_tensor("latents", "B", channels, 1, "H", "W"), reach, first=first)

    def forward(self, pixels: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        kept = self._kept(caches)
        image = patchify(pixels.movedim(-1, 1) * 2 - 1, patch_size=self.patch)
        moments = self.quant_conv(self.encoder(image, feat_cache=kept, feat_idx=[0]))
        values: Tensor = moments.chunk(2, dim=1)[0]
        latents = self.scaling.latents(values) if self.scaling is not None else values
        return (latents, *self._next(kept, values))


def _caches(part: nn.Module, chunks: Sequence[Tensor], **of_first: bool) -> tuple[Cache, ...]:
    """What an encoder or decoder keeps between chunks, from its own code: shapes only, nothing is computed.

    Two chunks go through, because the first leaves less: one frame, or nothing where it is not resampled in time.
    `of_first` are options of the first one.
    """
    kept: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in part.modules())
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        for chunk, options in zip(chunks, (of_first, {}), strict=True):
            position = [0]
            part(fake.from_tensor(chunk), feat_cache=kept, feat_idx=position, **options)
    used = kept[: position[0]]  # convolutions of one frame keep nothing
    return tuple(Cache(cache.shape[1], cache.shape[2], cache.shape[-1] // _PROBE) for cache in used)
