"""What the runtime knows how to feed and to read: the tensors of every engine, by name (docs/bundle.md has the table)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mc_runtime.bundle.manifest import Engine, Tensor

# Least rank of every tensor: latents of a video have one dimension more. An optional one ends in "?".
_TEXT = {"input_ids": 2, "attention_mask": 2}
_SIGNATURES: dict[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "planner": (
        {**_TEXT, "position_ids?": 3, "canvas_position_ids?": 5},
        {"canvas": 5, "context?": 3, "pooled?": 2},
    ),
    "text_encoder": (
        {**_TEXT, "input_ids_2?": 2, "attention_mask_2?": 2, "select?": 1},
        {"context": 3, "pooled?": 2},
    ),
    "step": (
        {
            "sample": 4, "history?": 5, "timestep": 1, "coefficients": 2, "guidance": 2, "context": 4, "context_mask": 3,
            "canvas?": 6,
        },
        {"next_sample": 4, "next_history?": 5},
    ),
    "vae_decoder": ({"latents": 4}, {"pixels": 4}),
}  # fmt: skip


def check_signature(component: str, engine: Engine, conditions: Iterable[str] = ()) -> None:
    """Raise ValueError where the runtime could not run an engine of this component: a tensor is missing, unknown or flat.

    `conditions` are the further inputs that the manifest names.
    """
    signature = _SIGNATURES.get(component)
    if signature is None:
        return
    signature = ({**signature[0], **dict.fromkeys(conditions, 1)}, signature[1])
    for side, known, tensors in zip(("inputs", "outputs"), signature, (engine.inputs, engine.outputs), strict=True):
        _check(f"engines.{component}.{side}", known, tensors)


def _check(place: str, known: Mapping[str, int], tensors: Sequence[Tensor]) -> None:
    ranks = {name.rstrip("?"): rank for name, rank in known.items()}
    for name in (name for name in known if not name.endswith("?")):
        if all(tensor.name != name for tensor in tensors):
            raise ValueError(f"{place}: {name!r} is missing")
    for tensor in tensors:
        if tensor.name not in ranks:
            raise ValueError(f"{place}: {tensor.name!r} is none of {', '.join(ranks)}")
        if len(tensor.shape) < ranks[tensor.name]:
            raise ValueError(f"{place}: {tensor.name!r} has {len(tensor.shape)} dimensions, expected {ranks[tensor.name]}")
