"""The adapters that a runtime has read, by name, and the stacks that requests made of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mc_runtime.bundle.manifest import Manifest
from mc_runtime.errors import RequestError, named, shown
from mc_runtime.lora.active import ActiveLora, activate, check_fit
from mc_runtime.lora.adapter import Adapter, read_adapter
from mc_runtime.tasks.checks import checked_number

LoraChoice = str | Sequence[str] | Mapping[str, float]
"""Adapters by name, or names with scales."""

# Stacks that are kept; each takes as much memory as all layers' pairs of the bundle's rank.
_KEPT = 4
_LARGEST_SCALE = 100.0


class LoraShelf:
    """Reads adapters once and stacks them for requests; several threads may share it."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._adapters: dict[str, Adapter] = {}
        self._stacks: OrderedDict[tuple[tuple[str, str, float], ...], ActiveLora] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all adapters that are loaded."""
        with self._lock:
            return tuple(self._adapters)

    def load(self, path: str | Path, name: str | None) -> str:
        """Read an adapter and check it against the bundle; its name. Raises RequestError."""
        if not isinstance(path, (str, Path)) or not isinstance(name, (str, type(None))):
            raise RequestError(f"a LoRA is read from a path and named by a text, got {shown(path)} and {shown(name)}")
        adapter = read_adapter(path, name)
        check_fit(self._manifest, [adapter])
        with self._lock:
            self._forget(adapter.name)
            self._adapters[adapter.name] = adapter
        return adapter.name

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises RequestError where there is none of that name."""
        with self._lock:
            self._forget(self._named(name).name)

    def active(self, choice: LoraChoice) -> ActiveLora:
        """What a request asked for, stacked; the last few are kept, since requests go back and forth. Raises RequestError."""
        scales = _scales(choice)
        with self._lock:
            chosen = [
                (
                    self._named(name),
                    checked_number(f"the scale of LoRA {named(name)}", scale, -_LARGEST_SCALE, _LARGEST_SCALE),
                )
                for name, scale in scales.items()
            ]
            key = tuple((adapter.name, adapter.digest, scale) for adapter, scale in chosen)
            found = self._stacks.pop(key, None) or activate(self._manifest, chosen)
            self._stacks[key] = found
            while len(self._stacks) > _KEPT:
                self._stacks.popitem(last=False)
        return found

    def _forget(self, name: str) -> None:
        """Let go of an adapter, if there is one of that name, and of the stacks that it is in; the lock is held."""
        self._adapters.pop(name, None)
        for key in [key for key in self._stacks if name in (adapter for adapter, _, _ in key)]:
            del self._stacks[key]

    def _named(self, name: str) -> Adapter:
        adapter = self._adapters.get(name) if isinstance(name, str) else None
        if adapter is None:
            there = ", ".join(map(named, self._adapters)) or "none"
            raise RequestError(f"no LoRA {shown(name)} is loaded (there is {there}); read it with load_lora first")
        return adapter


def _scales(choice: LoraChoice) -> Mapping[str, float]:
    """Scales by name. Raises RequestError."""
    if isinstance(choice, Mapping):
        return choice
    names = [choice] if isinstance(choice, str) else choice
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise RequestError(f"lora must name adapters, or map their names to scales; got {shown(choice)}")
    if len(set(names)) < len(names):
        raise RequestError(f"lora names an adapter twice, {shown(choice)}; give it a scale instead, as in {{name: 2.0}}")
    return dict.fromkeys(names, 1.0)
