"""Checkpoints: diffusers pipeline folders, with MetaCanvas's files beside them (see docs/checkpoint.md)."""

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint"]
