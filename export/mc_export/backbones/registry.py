"""Finds the backbone of a checkpoint by the classes its pipeline names."""

from __future__ import annotations

from mc_export.backbones.animatediff import AnimateDiff
from mc_export.backbones.base import Backbone
from mc_export.backbones.flux import Flux, FluxKontext
from mc_export.backbones.sana import Sana
from mc_export.backbones.sdxl import Sdxl
from mc_export.backbones.svd import StableVideoDiffusion
from mc_export.backbones.wan import Wan

BACKBONES: tuple[Backbone, ...] = (Sana(), Flux(), FluxKontext(), Wan(), Sdxl(), AnimateDiff(), StableVideoDiffusion())


def backbone_of(model_class: str, pipeline: str) -> Backbone | None:
    """The backbone whose diffusers class is ``model_class``, in a pipeline of class ``pipeline``, or None."""
    return next(
        (
            backbone
            for backbone in BACKBONES
            if model_class in backbone.model_classes and (not backbone.pipelines or pipeline in backbone.pipelines)
        ),
        None,
    )
