"""A checkpoint run by plain torch: what every bundle is compared with."""

from mc_export.reference.pipeline import ReferencePipeline, ReferenceResult

__all__ = ["ReferencePipeline", "ReferenceResult"]
