"""Tiny step programs of every backbone, made without a checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mc_export.backbones.animatediff import AnimateDiff
from mc_export.backbones.base import Backbone
from mc_export.backbones.flux import Flux, FluxKontext
from mc_export.backbones.sana import Sana
from mc_export.backbones.sdxl import Sdxl
from mc_export.backbones.svd import StableVideoDiffusion
from mc_export.backbones.wan import Wan
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from mc_export.program.step import StepProgram
from tests.factories import PLANNER_DIM, tiny_sana
from tests.factories_unet import tiny_animatediff, tiny_sdxl, tiny_svd
from tests.tiny_flux import tiny_flux
from tests.tiny_wan import tiny_wan


class Kind(NamedTuple):
    """A backbone, its tiny model by seed, and the keyframes of its canvas."""

    backbone: Backbone
    model: Callable[[int], Any]
    keyframes: int = 1


KINDS = {
    "sana": Kind(Sana(), tiny_sana),
    "flux": Kind(Flux(), lambda seed: tiny_flux(seed, guidance_embeds=False)),
    "flux-kontext": Kind(FluxKontext(), tiny_flux),
    "wan": Kind(Wan(), tiny_wan, 3),
    "wan-clips": Kind(Wan(), lambda seed: tiny_wan(seed, clips=True), 3),
    "sdxl": Kind(Sdxl(), tiny_sdxl),
    "animatediff": Kind(AnimateDiff(), tiny_animatediff, 3),
    "svd": Kind(StableVideoDiffusion(), tiny_svd, 3),
}
"""By name; `flux` is told no guidance scale, `wan-clips` takes a clip to edit and references."""


def tiny_step(
    name: str,
    *,
    canvas: bool = True,
    order: int = 1,
    seed: int = 9,
    model: Any = None,
    program: type[StepProgram] = StepProgram,
) -> StepProgram:
    """The step of one of :data:`KINDS`, or a part of it; with a canvas, its connector's projections are random."""
    kind = KINDS[name]
    model = model or kind.model(seed)
    connector = tiny_connector(kind, model, seed) if canvas else None
    width = kind.backbone.prepared_context_width(model.config)
    return program(
        CanvasBackbone(kind.backbone, model, connector), width, order=order, max_batch=4, max_tokens=16, max_length=64,
        max_canvas=8, max_frames=8, keyframes=kind.keyframes,
    ).eval()  # fmt: skip


def tiny_connector(kind: Kind, model: Any, seed: int = 9) -> CanvasConnector:
    """The connector of such a step, as published."""
    connector = CanvasConnector(PLANNER_DIM, kind.backbone.width(model.config)).eval()
    randomize_projections(connector, seed=seed + 1)
    return connector


def sizes_for(program: StepProgram, large: bool) -> dict[str, int]:
    """Odd sizes of every dynamic dimension: one small request, or three pictures that are larger than the exported one."""
    small, largest = list(program.check_extents())
    return largest | {"B": 3} if large else small
