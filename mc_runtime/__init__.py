"""mc-runtime: runs bundles of engines built by `mc-runtime build`, with no model code and no torch.

Names are resolved on first use, so that `import mc_runtime` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mc_runtime.errors import (
        BundleError,
        Cancelled,
        CheckpointError,
        EngineError,
        McRuntimeError,
        OutputError,
        RequestError,
    )
    from mc_runtime.runtime.plan import Plan
    from mc_runtime.runtime.result import Result, Step
    from mc_runtime.runtime.runtime import Runtime
    from mc_runtime.tasks.image_editing import ImageEditing
    from mc_runtime.tasks.image_to_video import ImageToVideo
    from mc_runtime.tasks.in_context_video import InContextVideo
    from mc_runtime.tasks.text_to_image import TextToImage
    from mc_runtime.tasks.text_to_video import TextToVideo
    from mc_runtime.tasks.video_editing import VideoEditing

__version__ = "0.1.0"

_HOMES = {
    "Runtime": "mc_runtime.runtime.runtime",
    "Plan": "mc_runtime.runtime.plan",
    "Result": "mc_runtime.runtime.result",
    "Step": "mc_runtime.runtime.result",
    "TextToImage": "mc_runtime.tasks.text_to_image",
    "ImageEditing": "mc_runtime.tasks.image_editing",
    "TextToVideo": "mc_runtime.tasks.text_to_video",
    "ImageToVideo": "mc_runtime.tasks.image_to_video",
    "VideoEditing": "mc_runtime.tasks.video_editing",
    "InContextVideo": "mc_runtime.tasks.in_context_video",
    "McRuntimeError": "mc_runtime.errors",
    "RequestError": "mc_runtime.errors",
    "OutputError": "mc_runtime.errors",
    "BundleError": "mc_runtime.errors",
    "CheckpointError": "mc_runtime.errors",
    "EngineError": "mc_runtime.errors",
    "Cancelled": "mc_runtime.errors",
}

__all__ = [
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ImageEditing",
    "ImageToVideo",
    "InContextVideo",
    "McRuntimeError",
    "OutputError",
    "Plan",
    "RequestError",
    "Result",
    "Runtime",
    "Step",
    "TextToImage",
    "TextToVideo",
    "VideoEditing",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mc_runtime' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
