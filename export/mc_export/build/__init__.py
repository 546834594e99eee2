"""Building a bundle: options, the engine cache, verification, and the build itself."""

from mc_export.build.build import build_bundle
from mc_export.build.options import BuildOptions, EngineChoice
from mc_export.build.progress import BuildEvent, ProgressCallback, State
from mc_export.build.reports import BuildReport, EngineReport

__all__ = [
    "BuildEvent",
    "BuildOptions",
    "BuildReport",
    "EngineChoice",
    "EngineReport",
    "ProgressCallback",
    "State",
    "build_bundle",
]
