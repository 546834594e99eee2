"""A planner LoRA that acts on the canvas rows only, in the planner's single pass (paper, section 3.1).

The adapter is a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``). PEFT itself would apply it to every row;
here it must not touch the instruction, so each adapted linear layer is wrapped instead.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mc_runtime.errors import CheckpointError

_KEY = re.compile(r"^base_model\.model\.(?:model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Options of PEFT that change the arithmetic; an adapter that uses one would silently give other pictures.
_UNSUPPORTED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
)


class CanvasRows:
    """Where the canvas begins in the rows of the pass under way; set by the planner, read by its LoRA layers."""

    start: int = 0


class CanvasLoraLinear(nn.Module):
    """``base(x)``, plus ``scaling * B A x`` at the rows from ``rows.start`` on."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scaling: float, rows: CanvasRows) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down.to(base.weight.dtype), requires_grad=False)
        self.up = nn.Parameter(up.to(base.weight.dtype) * scaling, requires_grad=False)
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:
        """``[B, S, in]`` to ``[B, S, out]``."""
        output: Tensor = self.base(input)
        start = self.rows.start
        delta = (input[:, start:] @ self.down.T) @ self.up.T
        return torch.cat([output[:, :start], output[:, start:] + delta], dim=1)


def apply_planner_lora(qwen: nn.Module, folder: Path) -> CanvasRows:
    """Wraps the adapted layers of ``qwen`` in place.

    Returns:
        The marker that the planner sets before every pass.

    Raises:
        CheckpointError: the adapter is unreadable, uses an option without support, or does not fit the planner.
    """
    weights_file = folder / "adapter_model.safetensors"
    try:
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(weights_file)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a readable PEFT adapter ({error}); save it again with save_pretrained") from error
    for option in _UNSUPPORTED:
        if getattr(config, option, None):
            raise CheckpointError(f"{folder}/adapter_config.json: {option!r} is not supported; train a plain LoRA or merge it")

    rows = CanvasRows()
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for layer, (down, up) in _pairs(weights, weights_file).items():
        try:
            base = qwen.get_submodule(layer)
        except AttributeError:
            base = None
        if not isinstance(base, nn.Linear):
            raise CheckpointError(
                f"{weights_file}: the planner has no linear layer {layer!r}; is the adapter for another model?"
            )
        if (up.shape[0], down.shape[1]) != tuple(base.weight.shape):
            raise CheckpointError(
                f"{weights_file}: {layer!r} adapts {up.shape[0]}x{down.shape[1]}, the planner's is {tuple(base.weight.shape)}"
            )
        parent, _, name = layer.rpartition(".")
        setattr(qwen.get_submodule(parent), name, CanvasLoraLinear(base, down, up, scaling, rows))
    return rows


def _pairs(weights: dict[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's ``(A, B)`` by layer; layers of the language model, named as in ``Qwen2_5_VLModel``."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        match = _KEY.match(key)
        if match is None or not match["layer"].startswith("language_model."):
            raise CheckpointError(f"{file}: {key!r} is not a LoRA weight of the language model")
        sides.setdefault(match["layer"], {})[match["side"]] = tensor
    for layer, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file}: {layer!r} has only lora_{next(iter(pair))}; both are needed")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}
