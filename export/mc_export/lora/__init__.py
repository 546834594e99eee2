"""LoRA adapters as inputs of engines: one build serves any adapter up to its rank, and changing it rebuilds nothing."""

from mc_export.lora.program import AdaptedProgram

__all__ = ["AdaptedProgram"]
