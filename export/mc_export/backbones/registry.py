"""Finds the backbone of a checkpoint by the class its pipeline names."""

from __future__ import annotations

from mc_export.backbones.base import Backbone
from mc_export.backbones.sana import Sana
from mc_export.backbones.wan import Wan

BACKBONES: tuple[Backbone, ...] = (Sana(), Wan())


def backbone_of(model_class: str) -> Backbone | None:
    """The backbone whose diffusers class is ``model_class``, or None."""
    return next((backbone for backbone in BACKBONES if model_class in backbone.model_classes), None)
