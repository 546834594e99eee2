"""Stage 1: the autoencoder, 64 px pictures to 8 x 8 latents and back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from examples.shapes import data
from examples.shapes.fit import Fit, fit
from examples.shapes.models import build_autoencoder

LATENT_NOISE = 0.1
"""Noise on the (unit variance) latents while the autoencoder learns: its decoder then forgives what diffusion leaves over."""


def render(scenes: list[data.Scene], rng: random.Random) -> Tensor:
    """Pictures of `scenes` as uint8 `[N, 3, 64, 64]`."""
    pictures = np.stack([np.asarray(data.draw(data.place(scene, rng))) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def to_signal(pictures: Tensor) -> Tensor:
    """uint8 pictures to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def psnr(autoencoder: AutoencoderDC, pictures: Tensor) -> float:
    """Peak signal to noise ratio of `pictures` (uint8) after encoding and decoding, in dB."""
    signal = to_signal(pictures)
    error = autoencoder.decode(autoencoder.encode(signal).latent).sample.clamp(-1, 1) - signal
    return float(10 * torch.log10(4 / error.square().mean()))


def train_autoencoder(work: Path, seed: int, steps: int, batch: int = 48) -> AutoencoderDC:
    """A new autoencoder: L1 on pixels and their differences; every latent channel is drawn to zero mean and unit variance."""
    rng = random.Random(seed)
    training, held_out = data.split()
    pictures = render(data.sample(training, 12_000, rng), rng)
    unseen = render(data.sample(held_out, 256, rng), rng)
    torch.manual_seed(seed)
    autoencoder = build_autoencoder()

    def loss_at(step: int) -> Tensor:
        signal = to_signal(pictures[torch.randint(len(pictures), (batch,))])
        latent = autoencoder.encode(signal).latent
        moments = latent.mean((0, 2, 3)).square().mean() + (latent.var((0, 2, 3)) - 1).square().mean()
        error = autoencoder.decode(latent + LATENT_NOISE * torch.randn_like(latent)).sample - signal
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 0.5 * edges + 0.05 * moments

    plan = Fit("autoencoder", steps, lr=2e-3)
    fit(plan, autoencoder, loss_at, work, seed, probe=lambda module: f"PSNR {psnr(module, unseen):.1f} dB on held-out scenes")
    with torch.no_grad():
        spread = autoencoder.encode(to_signal(unseen)).latent.std().item()
    autoencoder.register_to_config(scaling_factor=1 / spread)
    return autoencoder
