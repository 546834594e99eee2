"""Stage 2: the autoencoder, 64 px pictures to 16 x 16 latents and back."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from examples.shapes.edit import data
from examples.shapes.edit.models import build_autoencoder
from examples.shapes.edit.prompts import to_pixels
from examples.shapes.fit import Fit, fit
from examples.shapes.train_autoencoder import LATENT_NOISE, to_signal

CROP = 32
"""Side of the crops it learns on: convolutions need no more, and a crop costs a quarter of a picture."""


def latents_of(autoencoder: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The modes of u8 pictures `[N, 3, h, w]`, in the scale of the backbone's latents."""
    mode = autoencoder.encode(to_signal(pictures)).latent_dist.mode()
    return (mode - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor


def psnr(autoencoder: AutoencoderKL, pictures: Tensor) -> float:
    """Peak signal to noise ratio of `pictures` (uint8) after encoding and decoding, in dB."""
    signal = to_signal(pictures)
    error = autoencoder.decode(autoencoder.encode(signal).latent_dist.mode()).sample.clamp(-1, 1) - signal
    return float(10 * torch.log10(4 / error.square().mean()))


def train_autoencoder(work: Path, seed: int, steps: int, batch: int = 32) -> AutoencoderKL:
    """A new autoencoder: every latent channel is drawn to zero mean and unit variance.

    It learns by L1 on pixels and their differences, for edges, and by L2, for colours: their errors are few and large. Its
    latents are the distribution's mode, as FLUX-Kontext takes them; the variance is not trained.
    """
    rng = random.Random(seed)
    training, held_out = data.split()
    pictures = to_pixels([edit.pictures()[0] for edit in data.sample(training, 8_000, rng)])
    unseen = to_pixels([edit.pictures()[0] for edit in data.sample(held_out, 256, rng)])
    torch.manual_seed(seed)
    autoencoder = build_autoencoder()

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_at(step: int) -> Tensor:
        top, left = torch.randint(0, pictures.shape[-1] - CROP + 1, (2,)).tolist()
        chosen = torch.randint(len(pictures), (batch,))
        signal = to_signal(pictures[chosen, :, top : top + CROP, left : left + CROP])
        latent = autoencoder.encode(signal).latent_dist.mode().float()
        moments = latent.mean((0, 2, 3)).square().mean() + (latent.var((0, 2, 3)) - 1).square().mean()
        error = autoencoder.decode(latent + LATENT_NOISE * torch.randn_like(latent)).sample.float() - signal
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.05 * moments

    plan = Fit("autoencoder", steps, lr=2e-3, probe_every=400)
    fit(plan, autoencoder, loss_at, work, seed, probe=lambda module: f"PSNR {psnr(module, unseen):.1f} dB on held-out pictures")
    with torch.no_grad():
        spread = autoencoder.encode(to_signal(unseen)).latent_dist.mode().std().item()
    autoencoder.register_to_config(scaling_factor=1 / spread)
    return autoencoder
