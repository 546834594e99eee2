"""Stage 1: the autoencoder, 9 frames of 64 px to 3 x 8 x 8 latents and back; a single picture is a clip of one frame."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from examples.shapes.data import draw
from examples.shapes.fit import Fit, fit
from examples.shapes.video.cases import sample_cases
from examples.shapes.video.models import build_autoencoder
from examples.shapes.video.world import THINGS, reference_shape

LATENT_NOISE = 0.1
"""Noise on the (unit variance) latents while the autoencoder learns: its decoder then forgives what diffusion leaves over."""


def to_signal(frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> Tensor:
    """Clips u8 `[N, F, h, w, 3]` to floats `[N, 3, F, h, w]` in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def render(count: int, held_out: bool, rng: random.Random) -> NDArray[np.uint8]:
    """Films of all tasks, u8 `[count, F, h, w, 3]`."""
    return np.stack([case.target.frames() for case in sample_cases(count, held_out, rng)])


def references(count: int, rng: random.Random) -> NDArray[np.uint8]:
    """Reference pictures as clips of one frame, u8 `[count, 1, h, w, 3]`."""
    pictures = [draw([reference_shape(rng.choice(THINGS), rng)]) for _ in range(count)]
    return np.stack([np.asarray(picture)[None] for picture in pictures])


def psnr(autoencoder: AutoencoderKLWan, frames: NDArray[np.uint8]) -> float:
    """Peak signal to noise ratio of clips after encoding and decoding, in dB."""
    signal = to_signal(frames)
    error = autoencoder.decode(autoencoder.encode(signal).latent_dist.mode()).sample.clamp(-1, 1) - signal
    return float(10 * torch.log10(4 / error.square().mean()))


def train_autoencoder(work: Path, seed: int, steps: int, films: int = 4, pictures: int = 40) -> AutoencoderKLWan:
    """A new autoencoder: error and difference of pixels; every latent channel is drawn to zero mean and unit variance.

    Most of a step goes to single pictures: the frames of a film say little that its first one does not.
    """
    rng = random.Random(seed)
    clips, stills = render(6000, False, rng), references(3000, rng)
    stills = np.concatenate([stills, clips[:, :1]])
    unseen, unseen_pictures = render(64, True, rng), references(64, rng)
    torch.manual_seed(seed)
    autoencoder = build_autoencoder()

    def loss_of(frames: NDArray[np.uint8]) -> Tensor:
        signal = to_signal(frames)
        latent = autoencoder.encode(signal).latent_dist.mode().float()
        moments = latent.mean((0, 2, 3, 4)).square().mean() + (latent.var((0, 2, 3, 4)) - 1).square().mean()
        error = autoencoder.decode(latent + LATENT_NOISE * torch.randn_like(latent)).sample.float() - signal
        edges = error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 0.05 * moments

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_at(step: int) -> Tensor:
        of_films = loss_of(clips[torch.randint(len(clips), (films,)).numpy()])
        return of_films + loss_of(stills[torch.randint(len(stills), (pictures,)).numpy()])

    def probe(module: AutoencoderKLWan) -> str:
        return f"PSNR {psnr(module, unseen):.1f} dB on held-out films, {psnr(module, unseen_pictures):.1f} dB on pictures"

    fit(Fit("autoencoder", steps, lr=2e-3, probe_every=200), autoencoder, loss_at, work, seed, probe)
    with torch.no_grad():
        latents = autoencoder.encode(to_signal(render(256, False, rng))).latent_dist.mode()
    moments = {"latents_mean": latents.mean((0, 2, 3, 4)).tolist(), "latents_std": latents.std((0, 2, 3, 4)).tolist()}
    autoencoder.register_to_config(**moments)
    return autoencoder


def encode(autoencoder: AutoencoderKLWan, frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], batch: int = 64) -> Tensor:
    """Latents `[N, C, T, 8, 8]` of clips u8 `[N, F, 64, 64, 3]`, each channel of zero mean and unit variance."""
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(getattr(autoencoder.config, name)).view(shape) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        parts = [
            autoencoder.encode(to_signal(frames[start : start + batch])).latent_dist.mode()
            for start in range(0, len(frames), batch)
        ]
    return (torch.cat(parts) - mean) / std
