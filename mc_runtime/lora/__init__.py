"""LoRA adapters: read from files, stacked into the inputs that engines built with `--lora-rank` take."""

from mc_runtime.lora.active import PLAIN, ActiveLora, activate
from mc_runtime.lora.adapter import Adapter, read_adapter

__all__ = ["PLAIN", "ActiveLora", "Adapter", "activate", "read_adapter"]
