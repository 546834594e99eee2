"""Stage 3: connectors and backbone learn to film, by rectified flow, what the frozen planner has drawn; all tasks mixed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from examples.shapes.data import COLOURS
from examples.shapes.fit import Fit, fit
from examples.shapes.video.cases import Case, sample_cases
from examples.shapes.video.reading import Reader, plan
from examples.shapes.video.train_autoencoder import encode
from examples.shapes.video.world import Film
from mc_export.backbones.wan import Wan
from mc_export.model.canvas_model import CanvasModel
from mc_export.model.injection import CanvasBackbone
from mc_export.model.planner import Planner, PlannerStates

log = logging.getLogger("shapes")

DRAWS = 2
"""Draws of noise and time for each case of a batch; the request-only half of the connector runs once for all."""


@dataclass(frozen=True)
class Told:
    """What the backbone is told of N cases; `mc_runtime.runtime.conditions` fills the same from a request.

    Attributes:
        context, mask, canvas: the planner's states `[N, L, D]` and `[N, t, h, w, D]`, and which rows of the context count.
        first_frame, has_first_frame: `[N, C, 1, h, w]` and `[N]`.
        condition_latents, condition_mask: the clip to edit `[N, C, T, h, w]`, and `[N, 1, T, h, w]`.
        reference_frames, reference_mask: one slot, `[N, C, 1, h, w]` and `[N, 1]`.
    """

    context: Tensor
    mask: Tensor
    canvas: Tensor
    first_frame: Tensor
    has_first_frame: Tensor
    condition_latents: Tensor
    condition_mask: Tensor
    reference_frames: Tensor
    reference_mask: Tensor

    def rows(self, chosen: Tensor) -> Told:
        """Some of the cases."""
        return Told(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What goes to the step beside context and canvas."""
        return {field.name: getattr(self, field.name) for field in fields(self)[3:]}


class Painter(nn.Module):
    """What is trained here: the backbone and both connectors."""

    def __init__(self, backbone: WanTransformer3DModel, canvas: CanvasModel) -> None:
        super().__init__()
        self.backbone = CanvasBackbone(Wan(), backbone, canvas.canvas_connector)
        assert canvas.context_connector is not None
        self.context_connector = canvas.context_connector

    def prepare(self, states: PlannerStates) -> tuple[Tensor, Tensor]:
        """The request-only half: (context, canvas)."""
        assert self.backbone.connector is not None
        return self.context_connector(states.context), self.backbone.connector.draw(states.canvas)

    def forward(self, sample: Tensor, time: Tensor, context: Tensor, canvas: Tensor | None, told: Told) -> Tensor:
        """Velocity of `sample` `[N, C, T, h, w]` at `time` `[N]` in [0, 1]."""
        velocity: Tensor = self.backbone(sample, 1000 * time, context, told.mask, canvas, **told.conditions)
        return velocity


@torch.no_grad()
def tell(planner: Planner, autoencoder: AutoencoderKLWan, reader: Reader, cases: Sequence[Case], batch: int = 128) -> Told:
    """What the backbone is told of `cases`."""
    read = reader(cases)
    states = [plan(planner, read.rows(rows.tolist())) for rows in torch.arange(len(cases)).split(batch)]
    longest = max(part.context.shape[1] for part in states)
    context = torch.cat([F.pad(part.context, (0, 0, 0, longest - part.context.shape[1])) for part in states])
    canvas = torch.cat([part.canvas for part in states])
    frames, channels, side = canvas.shape[1], autoencoder.config.z_dim, 8

    def given(chosen: list[int], latents: Callable[[list[int]], Tensor], extent: int) -> tuple[Tensor, Tensor]:
        """Latents of the cases that have any, zeros of the others, and which those are."""
        whole, has = torch.zeros(len(cases), channels, extent, side, side), torch.zeros(len(cases))
        if chosen:
            whole[chosen], has[chosen] = latents(chosen), 1.0
        return whole, has

    def of_pictures(chosen: list[int]) -> Tensor:
        return encode(autoencoder, [np.asarray(cases[row].picture)[None] for row in chosen])

    def of_clips(chosen: list[int]) -> Tensor:
        return encode(autoencoder, [cases[row].clip for row in chosen])  # type: ignore[misc]  # those chosen have one

    by_task = {task: [row for row, case in enumerate(cases) if case.task == task] for task in {case.task for case in cases}}
    first, has_first = given(by_task.get("image-to-video", []), of_pictures, 1)
    clip, has_clip = given(by_task.get("video-editing", []), of_clips, frames)
    reference, has_reference = given(by_task.get("in-context-video", []), of_pictures, 1)
    mask = has_clip[:, None, None, None, None].expand(-1, 1, frames, side, side)
    return Told(context, read.mask[:, :longest], canvas, first, has_first, clip, mask, reference, has_reference[:, None])


@torch.no_grad()
def _clips_otherwise(autoencoder: AutoencoderKLWan, cases: Sequence[Case], clips: Tensor, rng: random.Random) -> Tensor:
    """The clips to edit, but the shape that the edit names has any colour.

    What comes out is the same. A painter that always had the true clip learns which colours become which, pair by pair, and
    paints a pair of a new instruction wrong whatever the canvas says.
    """
    others = clips.clone()
    edited = [row for row, case in enumerate(cases) if case.edited is not None]
    others[edited] = encode(autoencoder, [_otherwise(cases[row], rng).frames() for row in edited])
    return others


def _otherwise(case: Case, rng: random.Random) -> Film:
    assert case.source is not None
    assert case.edited is not None
    index, _ = case.edited
    return case.source.changed(index, thing=case.source.actors[index].thing._replace(colour=rng.choice(COLOURS)))


def train_painter(
    painter: Painter,
    planner: Planner,
    autoencoder: AutoencoderKLWan,
    reader: Reader,
    work: Path,
    seed: int,
    steps: int,
    probe: Callable[[nn.Module], str],
    pool: int = 10_000,
    batch: int = 20,
) -> None:
    """Trains in place on `pool` cases, `batch` of them a step, `DRAWS` times each."""
    cases = sample_cases(pool, False, random.Random(f"painter {seed}"), TRAINED)
    told = tell(planner, autoencoder, reader, cases)
    others = _clips_otherwise(autoencoder, cases, told.condition_latents, random.Random(f"painter {seed} otherwise"))
    latents = encode(autoencoder, [case.target.frames() for case in cases])
    log.info("painter: %d films, variance of latents %.2f", len(latents), latents.var())
    # A given first frame is not predicted.
    weight = torch.ones(len(cases), 1, latents.shape[2], 1, 1)
    weight[:, 0, 0, 0, 0] = 1 - told.has_first_frame

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def loss_at(step: int) -> Tensor:
        chosen = torch.randint(len(latents), (batch,))
        prepared = painter.prepare(PlannerStates(told.context[chosen], told.canvas[chosen]))
        context, canvas, rows = (tensor.repeat_interleave(DRAWS, 0) for tensor in (*prepared, chosen))
        latent = latents[rows]
        noise = torch.randn_like(latent)
        time = (torch.randn(len(rows)) + SHIFT).sigmoid()
        mix = time[:, None, None, None, None]
        other = torch.rand(len(rows)) < 0.5
        clips = torch.where(other[:, None, None, None, None], others[rows], told.condition_latents[rows])
        given = replace(told.rows(rows), condition_latents=clips)
        velocity = painter((1 - mix) * latent + mix * noise, time, context, canvas, given)
        return (weight[rows] * (velocity.float() - (noise - latent)).square()).mean()

    plan_of_stage = Fit("painter", steps, lr=1.5e-3, warmup=100, probe_every=200, average=0.997)
    fit(plan_of_stage, painter, loss_at, work, seed + 2, probe)


TRAINED = ("text-to-video", *2 * ("image-to-video",), *3 * ("video-editing",), "in-context-video")
"""The tasks of the pool, in turn: what must keep something of its input is learned the slowest."""
SHIFT = 0.4
"""Of the times that are trained on, towards noise, where the instruction is what there is to go by."""


@torch.no_grad()
def film(painter: Painter, autoencoder: AutoencoderKLWan, scheduler: object, told: Told, steps: int, seed: int) -> np.ndarray:
    """Films of all cases in one batch, u8 `[N, FRAMES, 64, 64, 3]`; for looking in while training."""
    context, canvas = painter.prepare(PlannerStates(told.context, told.canvas))
    sample = torch.randn(told.condition_latents.shape, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    for timestep in scheduler.timesteps:  # type: ignore[attr-defined]
        time = (timestep / 1000).float().expand(len(sample))
        velocity = painter(sample, time, context, canvas, told).float()
        sample = scheduler.step(velocity, timestep, sample, return_dict=False)[0]  # type: ignore[attr-defined]
        sample = painter.backbone.backbone.settled(sample, **told.conditions)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(getattr(autoencoder.config, name)).view(shape) for name in ("latents_mean", "latents_std"))
    pixels = autoencoder.decode(sample * std + mean).sample.clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
