"""Autoencoder programs equal diffusers' own models at odd sizes, with latents scaled as each pipeline scales them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from torch import Tensor, nn

from mc_export.autoencoders.base import Reach, Strides
from mc_export.autoencoders.registry import AUTOENCODERS, vae_program
from mc_export.autoencoders.scaling import LatentScaling
from mc_export.program.base import Program
from tests.factories import tiny_autoencoder_kl, tiny_temporal_decoder, tiny_vae, tiny_wan_autoencoder

FLUX = {"shift_factor": 0.1159, "scaling_factor": 0.3611, "use_quant_conv": False, "use_post_quant_conv": False}
MEAN_STD = {"latents_mean": (-1.6, 1.1, 3.2, -0.2), "latents_std": (8.4, 5.9, 5.0, 5.4), "scaling_factor": 0.5}


def close(actual: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs()
    assert difference.max() <= relative * max(1.0, expected.abs().max()), (
        f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    )


def unit(image: Tensor) -> Tensor:
    return (image / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("vae", "expected"), [
    (tiny_vae(1), Strides(1, 4)), (tiny_autoencoder_kl(1), Strides(1, 4)), (tiny_temporal_decoder(1), Strides(1, 2)),
    (tiny_wan_autoencoder("2.1"), Strides(4, 4)), (tiny_wan_autoencoder("2.2"), Strides(4, 8)),
])  # fmt: skip
def test_strides_are_the_decoders(vae: nn.Module, expected: Strides) -> None:
    described = AUTOENCODERS[type(vae).__name__]
    strides = described.strides(vae.config)
    assert strides == expected
    program = vae_program("vae_decoder", vae)
    pixels = program.run(program.example({"B": 1, "T": 3, "H": 2, "W": 3}))["pixels"]
    assert pixels.shape[-3:] == (2 * strides.space, 3 * strides.space, 3)


@pytest.mark.parametrize(("stride", "frames", "latent"), [(4, 1, 1), (4, 5, 2), (4, 121, 31), (1, 14, 14)])
def test_frames_and_latent_frames(stride: int, frames: int, latent: int) -> None:
    strides = Strides(stride, 8)
    assert (strides.frames(latent), strides.latent_frames(frames)) == (frames, latent)


@pytest.mark.parametrize("frames", [0, 2, 4, 6])
def test_frames_that_no_latents_stand_for_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4"):
        Strides(4, 8).latent_frames(frames)


def test_a_latent_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="zero"):
        LatentScaling([1.0, 0.0])


SCALED: dict[str, tuple[dict[str, object], Callable[[Tensor, dict], Tensor], Callable[[Tensor, dict], Tensor]]] = {
    # As StableDiffusionXLPipeline and AnimateDiffPipeline write it.
    "sdxl": ({}, lambda z, c: z / c["scaling_factor"], lambda z, c: z * c["scaling_factor"]),
    # As FluxKontextPipeline does.
    "flux": (FLUX, lambda z, c: z / c["scaling_factor"] + c["shift_factor"],
             lambda z, c: (z - c["shift_factor"]) * c["scaling_factor"]),
    # As StableDiffusionXLPipeline and its image-to-image do with means and deviations.
    "mean and std": (MEAN_STD,
                     lambda z, c: z * channels(c["latents_std"]) / c["scaling_factor"] + channels(c["latents_mean"]),
                     lambda z, c: (z - channels(c["latents_mean"])) * c["scaling_factor"] / channels(c["latents_std"])),
}  # fmt: skip


def channels(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers).view(1, -1, 1, 1)


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("size", [(5, 3), (2, 7)])
def test_kl_decodes_and_encodes_as_its_pipelines_do(kind: str, size: tuple[int, int]) -> None:
    overrides, values, scaled = SCALED[kind]
    vae = tiny_autoencoder_kl(seed=7, **overrides)
    latents = 2 * drawn(3, 4, *size)
    with torch.no_grad():
        expected = unit(vae.decode(values(latents, vae.config)).sample)
        close(vae_program("vae_decoder", vae).run({"latents": latents})["pixels"], expected)
        mode = vae.encode(expected.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        close(vae_program("vae_encoder", vae).run({"pixels": expected})["latents"], scaled(mode, vae.config))


def test_a_backbone_can_take_what_the_encoder_gives() -> None:
    """SVD: `StableVideoDiffusionPipeline` conditions on the mode without its scale."""
    vae = tiny_temporal_decoder(seed=3)
    pixels = torch.rand(2, 6, 10, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mode = vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    close(vae_program("vae_encoder", vae, Reach(scale_encoded=False)).run({"pixels": pixels})["latents"], mode)
    close(vae_program("vae_encoder", vae).run({"pixels": pixels})["latents"], mode * vae.config.scaling_factor)


@pytest.mark.parametrize(("batch", "frames", "chunk"), [(1, 5, 5), (1, 5, 2), (2, 4, 4), (1, 3, 1), (2, 6, 3)])
def test_temporal_decoder_equals_the_pipeline_at_its_chunk_size(batch: int, frames: int, chunk: int) -> None:
    vae = tiny_temporal_decoder(seed=3)
    latents = drawn(batch, 4, frames, 3, 5, seed=2)
    pipeline = StableVideoDiffusionPipeline.__new__(StableVideoDiffusionPipeline)
    object.__setattr__(pipeline, "vae", vae)
    with torch.no_grad():
        expected = unit(pipeline.decode_latents(latents.transpose(1, 2), frames, decode_chunk_size=chunk))
    program = vae_program("vae_decoder", vae)
    chunks = [program.run({"latents": part})["pixels"] for part in latents.split(chunk, dim=2)]
    close(torch.cat(chunks, dim=1), expected)


def through(first: Program, following: Program, chunks: list[Tensor], taken: str, given: str) -> Tensor:
    """Chunks through a pair of graphs, the caches of one being the next one's."""
    made, caches = [], {}
    for index, chunk in enumerate(chunks):
        outputs = (following if index else first).run({taken: chunk, **caches})
        made.append(outputs.pop(given))
        caches = {name.removeprefix("next_"): cache for name, cache in outputs.items()}
    return torch.cat(made, dim=1 if given == "pixels" else 2)


@pytest.mark.parametrize("kind", ["2.1", "2.2"])
@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17])
def test_wan_in_chunks_equals_the_whole_clip(kind: str, frames: int) -> None:
    vae = tiny_wan_autoencoder(kind, seed=5)
    config, described = vae.config, AUTOENCODERS["AutoencoderKLWan"]
    strides = described.strides(config)
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
    latents = drawn(2, 4, strides.latent_frames(frames), 5, 3, seed=frames)
    graphs = {component: vae_program(component, vae) for component in described.components}
    with torch.no_grad():
        expected = unit(vae.decode(latents / inverse + mean).sample)
        encoded = (vae.encode(expected.movedim(-1, 1) * 2 - 1).latent_dist.mode() - mean) * inverse
    pixels = through(graphs["vae_decoder"], graphs["vae_decoder_next"], list(latents.split(1, dim=2)), "latents", "pixels")
    assert pixels.shape[1] == frames
    close(pixels, expected)
    chunks = [expected[:, :1], *expected[:, 1:].split(strides.time, dim=1)][: latents.shape[2]]
    close(through(graphs["vae_encoder"], graphs["vae_encoder_next"], chunks, "pixels", "latents"), encoded)


def test_wan_caches_are_fewer_than_its_convolutions_and_all_are_used() -> None:
    """A cache that is not read would travel for nothing: each changes the next chunk's result."""
    vae = tiny_wan_autoencoder("2.2", seed=5)
    program = vae_program("vae_decoder_next", vae)
    feed = program.example({"B": 1, "H": 2, "W": 3})
    expected = program.run(feed)["pixels"]
    for name in [name for name in feed if name.startswith("cache_")]:
        changed = program.run({**feed, name: feed[name] + 1.0})["pixels"]
        assert not torch.equal(changed, expected), name
