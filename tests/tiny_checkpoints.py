"""Every tiny checkpoint there is: of each backbone one of MetaCanvas, with all it can have, and the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana
from tests.factories_unet import (
    tiny_metacanvas_animatediff,
    tiny_metacanvas_sdxl,
    tiny_metacanvas_svd,
    tiny_stock_animatediff,
    tiny_stock_sdxl,
    tiny_stock_svd,
)
from tests.tiny_flux import tiny_metacanvas_flux, tiny_stock_flux
from tests.tiny_wan import tiny_metacanvas_wan, tiny_stock_wan

_SEED = 3

TINY_CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "sana": partial(tiny_metacanvas_checkpoint, seed=_SEED, lora=True),
    "sana, stock": partial(tiny_stock_sana, seed=_SEED),
    "flux, stock": partial(tiny_stock_flux, seed=_SEED, kind="flux"),
    "flux-kontext": partial(tiny_metacanvas_flux, seed=_SEED),
    "flux-kontext, stock": partial(tiny_stock_flux, seed=_SEED),
    "wan": partial(tiny_metacanvas_wan, seed=_SEED, tasks=("text-to-video", "image-to-video", "video-editing")),
    "wan, stock": partial(tiny_stock_wan, seed=_SEED, image_to_video=True),
    "sdxl": partial(tiny_metacanvas_sdxl, seed=_SEED),
    "sdxl, stock": partial(tiny_stock_sdxl, seed=_SEED),
    "animatediff": partial(tiny_metacanvas_animatediff, seed=_SEED),
    "animatediff, stock": partial(tiny_stock_animatediff, seed=_SEED),
    "svd": partial(tiny_metacanvas_svd, seed=_SEED),
    "svd, stock": partial(tiny_stock_svd, seed=_SEED),
}
"""By name, what writes one into a folder."""
