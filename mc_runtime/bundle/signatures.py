"""What the runtime knows how to feed and to read: the tensors of every engine, by name (docs/bundle.md has the table)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mc_runtime.bundle.engines import LORA_SUFFIX, STEP, STEP_FIRST, STEP_REST, lora_inputs

if TYPE_CHECKING:
    from mc_runtime.bundle.manifest import Engine, Tensor

# Least rank of every tensor: latents of a video have one dimension more. An optional one ends in "?".
_TEXT = {"input_ids": 2, "attention_mask": 2}
_STEP = {
    "sample": 4, "history?": 5, "timestep": 1, "coefficients": 2, "guidance": 2, "context": 4, "context_mask": 3,
}  # fmt: skip
_HIDDEN = {"hidden": 5, "hidden_*?": 4, "change": 5}
_KEPT = {"kept_change": 5, "kept_residual": 5}
_STEPPED = {"next_sample": 4, "next_history?": 5}
_ADAPTED = ("planner", "text_encoder", "image_encoder", STEP, STEP_FIRST, STEP_REST)
_SIGNATURES: dict[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "vision": (
        {"pixels": 3, "positions": 3, "windows": 2, "window_places": 2, "frames": 2, "frame_places": 2},
        {"vision": 2},
    ),
    "planner": (
        {**_TEXT, "position_ids?": 3, "canvas_position_ids?": 5, "vision?": 2, "vision_index?": 2},
        {"canvas": 5, "context?": 3, "pooled?": 2},
    ),
    "text_encoder": (
        {**_TEXT, "input_ids_2?": 2, "attention_mask_2?": 2, "select?": 1},
        {"context": 3, "pooled?": 2},
    ),
    "image_encoder": ({"pixels": 4}, {"context": 3}),
    STEP: ({**_STEP, "canvas?": 6}, _STEPPED),
    STEP_FIRST: ({**_STEP, "canvas?": 6, **_KEPT}, {**_STEPPED, **_HIDDEN, "difference": 1}),
    STEP_REST: ({**_STEP, **_HIDDEN, **_KEPT, "keep": 1}, {**_STEPPED, "next_change": 5, "next_residual": 5}),
    "vae_decoder": ({"latents": 4}, {"pixels": 4, "next_cache_*?": 5}),
    "vae_decoder_next": ({"latents": 5, "cache_*": 5}, {"pixels": 5, "next_cache_*": 5}),
    "vae_encoder": ({"pixels": 4}, {"latents": 4, "next_cache_*?": 5}),
    "vae_encoder_next": ({"pixels": 5, "cache_*": 5}, {"latents": 5, "next_cache_*": 5}),
}  # fmt: skip


def check_signature(component: str, engine: Engine, conditions: Iterable[str] = ()) -> None:
    """Raise ValueError where the runtime could not run an engine of this component: a tensor is missing, unknown or flat.

    `conditions` are the further inputs that the manifest names.
    """
    plain = component.removesuffix(LORA_SUFFIX)
    signature = _SIGNATURES.get(plain)
    if signature is None:
        return
    # What enters with the latents alone is in the hidden states that the rest of a step takes.
    conditions = [f"{name}?" for name in conditions] if plain == STEP_REST else conditions
    adapters = [name for names in lora_inputs(engine.lora) for name in names] if component.endswith(LORA_SUFFIX) else []
    signature = ({**signature[0], **dict.fromkeys(conditions, 1), **dict.fromkeys(adapters, 3)}, signature[1])
    for side, known, tensors in zip(("inputs", "outputs"), signature, (engine.inputs, engine.outputs), strict=True):
        _check(f"engines.{component}.{side}", known, tensors)


def _check(place: str, known: Mapping[str, int], tensors: Sequence[Tensor]) -> None:
    ranks = {name.rstrip("?"): rank for name, rank in known.items()}
    for name in (name for name in known if not name.endswith("?")):
        if all(_kind(tensor.name) != name for tensor in tensors):
            raise ValueError(f"{place}: {name!r} is missing")
    for tensor in tensors:
        kind = _kind(tensor.name)
        if kind not in ranks:
            raise ValueError(f"{place}: {tensor.name!r} is none of {', '.join(ranks)}")
        if len(tensor.shape) < ranks[kind]:
            raise ValueError(f"{place}: {tensor.name!r} has {len(tensor.shape)} dimensions, expected {ranks[kind]}")


def check_chunks(engines: Mapping[str, Engine]) -> None:
    """Raise ValueError where a clip could not go chunk by chunk through a pair of engines, such as `vae_decoder` and
    `vae_decoder_next`: they are of two libraries, or the caches that one gives are not those that the next one takes.
    """
    for component in ("vae_decoder", "vae_encoder"):
        first, following = engines.get(component), engines.get(f"{component}_next")
        given = _caches(first.outputs, "next_cache_*") if first else {}
        if following is None and given:
            raise ValueError(f"engines: '{component}_next' is missing, which takes what {component!r} keeps of a clip")
        if following is None:
            continue
        if first is None or first.target != following.target:
            raise ValueError(f"engines.{component}_next: needs a {component!r} of the same target, {following.target}")
        taken, kept = _caches(following.inputs, "cache_*"), _caches(following.outputs, "next_cache_*")
        for found in (given, kept):
            if found != {f"next_{name}": shape for name, shape in taken.items()}:
                raise ValueError(f"engines.{component}_next: its caches are not those that the chunk before it gives")


def check_lora_engines(engines: Mapping[str, Engine]) -> None:
    """Raise ValueError where a request's adapters would not do what they are to: an engine cannot stand in for its plain one,
    or a step in two parts takes an adapter for other layers than the whole one.
    """
    for component, engine in engines.items():
        plain = engines.get(component.removesuffix(LORA_SUFFIX))
        if not component.endswith(LORA_SUFFIX):
            if engine.lora:
                raise ValueError(
                    f"engines.{component}.lora: belongs to an engine that stands in for it, {component + LORA_SUFFIX!r}"
                )
            continue
        if component.removesuffix(LORA_SUFFIX) not in _ADAPTED:
            raise ValueError(f"engines.{component}: no request runs it; adapters are for {', '.join(_ADAPTED)}")
        if plain is None or not engine.lora:
            raise ValueError(f"engines.{component}: needs layers to adapt in 'lora', and the engine that it stands in for")
        adapters = {name for names in lora_inputs(engine.lora) for name in names}
        if tuple(one for one in engine.inputs if one.name not in adapters) != plain.inputs or engine.outputs != plain.outputs:
            raise ValueError(f"engines.{component}: takes or gives something else than the engine that it stands in for")
    whole, first, rest = (engines.get(name + LORA_SUFFIX) for name in (STEP, STEP_FIRST, STEP_REST))
    if first or rest:
        targets = {engines[name].target for name in (STEP_FIRST, STEP_REST)} | {part.target for part in (first, rest) if part}
        if len(targets) > 1:
            raise ValueError(f"engines: the parts of a step are of one target, found {', '.join(sorted(targets))}")
        if not _layers(whole) <= _layers(first) | _layers(rest):
            raise ValueError(
                f"engines: {STEP_FIRST!r} and {STEP_REST!r} take no adapters of some layers that {STEP!r} takes them of"
            )


def _layers(engine: Engine | None) -> set[str]:
    return {layer for group in engine.lora for layer in group.layers} if engine else set()


def _caches(tensors: Sequence[Tensor], kind: str) -> dict[str, tuple[int | str, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors if _kind(tensor.name) == kind}


def _kind(name: str) -> str:
    """The name of one of many without what tells it apart: `cache_*` for `cache_07`, `hidden_*` for `hidden_context`."""
    return re.sub(r"^hidden_\w+$", "hidden_*", re.sub(r"cache_\d\d$", "cache_*", name))
