"""The tests' tiny checkpoints, a second's work each: they prove that the scripts run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import mid, models


def checkpoint(name: str, work: Path, *, stock: bool = False) -> Path:
    """The MetaCanvas checkpoint of a backbone, or SANA's stock pipeline, in a new folder."""
    from tests import factories, factories_unet, tiny_flux, tiny_wan

    folder = Path(tempfile.mkdtemp(dir=work)) / f"tiny-{'stock' if stock else 'metacanvas'}"
    if stock:
        return factories.tiny_stock_sana(folder, scheduler=models.scheduler())
    make = {
        "sana": factories.tiny_metacanvas_checkpoint,
        "flux-kontext": tiny_flux.tiny_metacanvas_flux,
        "wan": tiny_wan.tiny_metacanvas_wan,
        "sdxl": factories_unet.tiny_metacanvas_sdxl,
        "svd": factories_unet.tiny_metacanvas_svd,
        "animatediff": factories_unet.tiny_metacanvas_animatediff,
    }[name]
    return make(folder)


def media(subject: mid.Subject | None) -> dict[str, Any]:
    """What its task takes, small."""
    if subject is None:
        return {}
    shown = {"image": mid.picture((32, 32))} if subject.shows else {}
    return shown | ({} if subject.frames is None else {"frames": 5})
