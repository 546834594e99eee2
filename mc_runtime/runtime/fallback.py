"""Which of a bundle's two sets of engines this machine runs: its own, or those it was built with for other machines."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mc_runtime.backends.base import Settings
from mc_runtime.bundle.machine import check_machine
from mc_runtime.bundle.store import Bundle
from mc_runtime.errors import BundleError, EngineError, RequestError, shown
from mc_runtime.runtime.engines import Engines


class Runnable(NamedTuple):
    """A bundle with the engines that run here; `why` its own do not, or None."""

    bundle: Bundle
    engines: Engines
    why: str | None


def runnable(bundle: Bundle, settings: Settings, fallback: str | None) -> Runnable:
    """The bundle's own engines where this machine has what they need; else those of the target `fallback`, if it holds them.

    What they need is asked without loading one: the libraries, their versions, the GPU.

    Raises:
        BundleError, EngineError: its own do not run here and no fallback was asked for, or the fallback's do not either.
        RequestError: `fallback` is no target's name.
    """
    if fallback is not None and not isinstance(fallback, str):
        raise RequestError(f"fallback must be a target's name such as onnxruntime, got {shown(fallback)}")
    try:
        return Runnable(bundle, _checked(bundle, settings), None)
    except (BundleError, EngineError) as error:
        spare = bundle.manifest.fallback
        held = sorted({engine.target for engine in spare.engines.values()}) if spare else []
        if fallback is None:
            if held:
                raise type(error)(f"{error}; or run the engines it holds for that with --fallback {held[0]}") from error
            raise
        if fallback not in held:
            has = f"only {', '.join(held)} ones" if held else "none"
            raise type(error)(
                f"{error}; of engines to fall back on it holds {has}: build it with --fallback {fallback}"
            ) from error
        other = replace(bundle, manifest=bundle.manifest.on_fallback())
        return Runnable(other, _checked(other, settings), str(error))


def _checked(bundle: Bundle, settings: Settings) -> Engines:
    check_machine(bundle.manifest.machine, bundle.path)
    engines = Engines(bundle, settings)
    engines.check()
    return engines
