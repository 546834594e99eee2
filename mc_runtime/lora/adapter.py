"""A LoRA on disk: a safetensors file as PEFT or diffusers writes it, or PEFT's folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import RequestError, named, shown
from mc_runtime.media.files import check_readable, read_bytes

# An adapter of rank 512 for the largest backbone takes 6 GiB; a file beyond that is something else.
_LARGEST_FILE = 8 * 2**30
_LARGEST_CONFIG = 2**24
# Times the largest scale of a request it is still a number of float32.
_LARGEST_NUMBER = 1e30
_PEFT_CONFIG, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_PEFT_PREFIX = re.compile(r"^base_model\.model\.(?:model\.)?")
# PEFT's options that change the arithmetic; ignored, they would silently give other pictures.
_OTHER_ARITHMETIC = (
    "use_dora",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_bias",
    "use_bdlora",
)
# Of `init_lora_weights`: the adapter is what was left of the layer's own weight, which changed, too.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA: for some layers, what is added to their weight, `B A`.

    Attributes:
        name: how requests call it.
        layers: by the layer's name in the checkpoint, f32 A `[rank, in]` and B `[out, rank]`; alpha is in B.
        digest: sha256 of its arrays, for caches.
    """

    name: str
    layers: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    digest: str

    @property
    def rank(self) -> int:
        """The largest of its layers' ranks."""
        return max(len(down) for down, _ in self.layers.values())


def read_adapter(path: str | Path, name: str | None = None) -> Adapter:
    """Read an adapter: diffusers' `pytorch_lora_weights.safetensors`, PEFT's folder of a planner's, or another such file.

    Keys are `transformer.` or `unet.` (the backbone's) or `planner.` and a layer's name, with `.lora_A.weight` and
    `.lora_B.weight`; PEFT's own `base_model.model.` stands for `planner.`. alpha comes from the file's `.alpha` entries, its
    `lora_adapter_metadata`, or the folder's `adapter_config.json`; without any it is the rank.

    Args:
        path: a safetensors file, or a folder with one.
        name: how requests call it; the file's or folder's own name by default.

    Raises:
        RequestError: it cannot be read, or is no plain LoRA of linear layers.
    """
    place = Path(path)
    file = _file_of(place)
    tensors, metadata = _tensors(file)
    settings = _settings(place, metadata, file)
    layers: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for layer, sides in _sides(tensors, file).items():
        down, up, said = sides["A"], sides["B"], f"{file}: {named(layer)}"
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or 0 in (*down.shape, *up.shape):
            raise RequestError(
                f"{said} has A {list(down.shape)} and B {list(up.shape)}; only LoRAs of linear layers are supported"
            )
        if _full_name(layer) in layers:
            raise RequestError(f"{said} is in it twice, by two names; save the adapter again")
        alpha = tensors.get(f"{layer}.alpha")
        if alpha is not None and alpha.size != 1:
            raise RequestError(f"{said} has {alpha.size} numbers for its alpha; fetch it again")
        scaling = settings.scaling(_family(layer), len(down)) if alpha is None else float(alpha.reshape(-1)[0]) / len(down)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite any more is refused
            scaled: NDArray[np.float32] = up * np.float32(scaling)
        for array in (down, scaled):
            if not float(np.abs(array).max()) < _LARGEST_NUMBER:
                raise RequestError(f"{said} has numbers beyond {_LARGEST_NUMBER:g}, its alpha with them; fetch it again")
        layers[_full_name(layer)] = (down, scaled)
    digest = hashlib.sha256()
    for layer, arrays in sorted(layers.items()):
        digest.update(layer.encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
    return Adapter(name or (place.name if place.is_dir() else place.stem), layers, digest.hexdigest())


@dataclass(frozen=True)
class _Settings:
    """alpha, and whether it is divided by the rank's root, by the part of the pipeline."""

    by_family: Mapping[str, tuple[float | None, bool]]

    def scaling(self, family: str, rank: int) -> float:
        """What `B A` is multiplied by."""
        alpha, rooted = self.by_family.get(family, (None, False))
        return 1.0 if alpha is None else alpha / (rank**0.5 if rooted else rank)


def _file_of(place: Path) -> Path:
    """The file itself, which can be read and ends. Raises RequestError."""
    file = place
    try:
        if place.is_dir():
            found = sorted(place.glob("*.safetensors"))
            if len(found) != 1:
                raise RequestError(f"{place}: has {len(found)} safetensors files; name the LoRA's file itself")
            file = found[0]
        elif not place.exists():
            raise RequestError(f"{named(str(place))}: no such LoRA; name a safetensors file or PEFT's folder")
    except OSError as error:
        raise RequestError(f"{named(str(place))}: cannot be read ({error.strerror}); check the name") from None
    if check_readable(file, sys.maxsize) > _LARGEST_FILE:
        raise RequestError(f"{file}: is larger than any LoRA; name the adapter, not the model")
    return file


def _tensors(file: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """All tensors as float32, and the header's metadata; bfloat16 is widened here, since numpy has none."""
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = dict(opened.metadata() or {})
        entries = deserialize(file.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RequestError(f"{file}: not a readable safetensors file ({named(str(error))}); nothing else is loaded") from None
    tensors = {name: _array(entry, f"{file}: {named(name)}") for name, entry in entries}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise RequestError(f"{file}: {named(name)} is not finite; fetch it again")
    return tensors, metadata


def _array(entry: Mapping[str, Any], where: str) -> NDArray[np.float32]:
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise RequestError(f"{where} is {entry['dtype']}; save the LoRA in F32, F16 or BF16")
    try:
        raw: NDArray[Any] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
    except ValueError:  # without numbers, a shape may have sizes that numpy cannot count
        raise RequestError(f"{where} has the shape {shown(entry['shape'])}; fetch it again") from None
    widened: NDArray[np.float32] = raw.astype(np.float32)
    if entry["dtype"] == "BF16":
        widened = (raw.astype(np.uint32) << 16).view(np.float32)
    return widened


def _sides(tensors: Mapping[str, NDArray[np.float32]], file: Path) -> dict[str, dict[str, NDArray[np.float32]]]:
    sides: dict[str, dict[str, NDArray[np.float32]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            if key.endswith(".alpha"):
                continue
            raise RequestError(
                f"{file}: {named(key)!r} is none of PEFT's LoRA keys; load it with diffusers' `load_lora_weights` and save it "
                "again with `save_lora_weights`"
            )
        pair = sides.setdefault(match["layer"], {})
        if match["side"] in pair:
            raise RequestError(f"{file}: {named(key)} is in it twice, with and without `default`; save the adapter again")
        pair[match["side"]] = tensor
    for layer, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise RequestError(f"{file}: {named(layer)} has lora_{next(iter(pair))} only; fetch it again")
    for key in tensors:
        if key.endswith(".alpha") and key.removesuffix(".alpha") not in sides:
            raise RequestError(f"{file}: {named(key)} is of a layer that it has no LoRA of; fetch it again")
    if not sides:
        raise RequestError(f"{file}: has no LoRA in it")
    return sides


def _full_name(layer: str) -> str:
    return _PEFT_PREFIX.sub("planner.", layer)


def _family(layer: str) -> str:
    return _full_name(layer).partition(".")[0]


def _settings(place: Path, metadata: Mapping[str, str], file: Path) -> _Settings:
    """From PEFT's `adapter_config.json` beside the weights, or what diffusers keeps of it in the file."""
    config = place / _PEFT_CONFIG if place.is_dir() else place.parent / _PEFT_CONFIG
    flat: Mapping[str, Any] = {}
    if (place.is_dir() or place.name == _PEFT_WEIGHTS) and os.path.lexists(config):
        flat = {f"planner.{key}": value for key, value in _object(read_bytes(config, _LARGEST_CONFIG), file).items()}
    elif "lora_adapter_metadata" in metadata:
        flat = _object(metadata["lora_adapter_metadata"], file)
    by_family: dict[str, tuple[float | None, bool]] = {}
    for key, value in flat.items():
        family, _, option = key.partition(".")
        changes = option == "init_lora_weights" and str(value).startswith(_CHANGES_WEIGHTS)
        if (option in _OTHER_ARITHMETIC and value) or changes:
            raise RequestError(f"{file}: {option!r} is not supported; train a plain LoRA, or merge it before `build`")
        alpha, rooted = by_family.get(family, (None, False))
        if option == "lora_alpha":
            by_family[family] = (_alpha(value, file), rooted)
        elif option == "use_rslora":
            by_family[family] = (alpha, _rooted(value, file))
    return _Settings(by_family)


def _object(text: str | bytes, file: Path) -> Mapping[str, Any]:
    """A configuration's JSON object. Raises RequestError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}: its configuration cannot be read ({named(str(error))}); save the adapter again") from None
    if not isinstance(found, Mapping):
        raise RequestError(f"{file}: its configuration is no JSON object; save the adapter again")
    return found


def _alpha(value: Any, file: Path) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _LARGEST_NUMBER:
        raise RequestError(f"{file}: its lora_alpha is {shown(value)} where a number is wanted; save the adapter again")
    return float(value)


def _rooted(value: Any, file: Path) -> bool:
    if not isinstance(value, (bool, type(None))):  # the text "false" is true, and would give another scale
        raise RequestError(f"{file}: its use_rslora is {shown(value)} where true or false is wanted; save the adapter again")
    return bool(value)
