"""What the autoencoder's engines are given in real requests: inputs to calibrate on, from latents that were denoised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mc_export.autoencoders.registry import AUTOENCODERS, vae_program
from mc_export.program.base import Program

Feed = dict[str, Tensor]
# A clip's chunks are alike after the first ones, and their caches are large.
_CHUNKS = 3


@torch.inference_mode()
def autoencoder_feeds(vae: nn.Module, latents: Tensor) -> dict[str, list[Feed]]:
    """The inputs of every engine of an autoencoder as one request gives them.

    Args:
        vae: the autoencoder; changed in place, with the same results.
        latents: as denoised, `[B, C, H, W]` or `[B, C, T, H, W]`. What they decode to is what the encoder is given.
    """
    programs = {name: vae_program(name, vae).eval() for name in AUTOENCODERS[type(vae).__name__].components}
    recorded: dict[str, list[Feed]] = {name: [] for name in programs}
    if len(programs["vae_decoder"].inputs[0].shape) == 4 and latents.ndim == 5:
        latents = latents.transpose(1, 2).flatten(0, 1)
    taken = list(latents.split(1, dim=2))[:_CHUNKS] if "vae_decoder_next" in programs else [latents]
    pixels = _through(programs, recorded, "vae_decoder", taken)
    if len(programs["vae_encoder"].inputs[0].shape) == 4:
        pixels = [chunk.flatten(0, 1)[:1] if chunk.ndim == 5 else chunk for chunk in pixels]
    _through(programs, recorded, "vae_encoder", pixels)
    return recorded


def _through(
    programs: dict[str, Program], recorded: dict[str, list[Feed]], component: str, chunks: list[Tensor]
) -> list[Tensor]:
    """The chunks through one direction, whose inputs are recorded on the way."""
    made: list[Tensor] = []
    caches: Feed = {}
    for chunk in chunks:
        name = f"{component}_next" if made else component
        feed = {programs[name].inputs[0].name: chunk, **caches}
        recorded[name].append(feed)
        outputs = programs[name].run(feed)
        made.append(outputs.pop(programs[name].outputs[0].name))
        caches = {output.removeprefix("next_"): cache for output, cache in outputs.items()}
    return made
