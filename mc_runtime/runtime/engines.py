"""The engines of an opened bundle, each loaded once, in the background, by the backend its manifest entry names."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mc_runtime.backends.base import Array, Backend, Engine, Settings, Shapes, all_finite
from mc_runtime.backends.registry import create_backend
from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.store import Bundle
from mc_runtime.errors import BundleError, EngineError
from mc_runtime.runtime.work import EngineClock, Work


@dataclass
class LoadedEngine:
    """An engine with its backend and its manifest entry; `seconds` adds up the time spent inside the library."""

    spec: EngineSpec
    backend: Backend
    engine: Engine

    def run(self, arrays: Mapping[str, Array], clock: EngineClock) -> dict[str, Array]:
        """Run once on host arrays and give host arrays back. Raises EngineError, also for numbers that are not finite."""
        return {name: np.asarray(found) for name, found in self.run_keeping((), arrays, clock).items()}

    def run_keeping(
        self, kept: Collection[str], arrays: Mapping[str, Array], clock: EngineClock
    ) -> dict[str, Array | Resident]:
        """Run once on host arrays; outputs of the names `kept` stay on the device where its backend keeps them.

        Raises EngineError, also for numbers that are not finite, but for those that only the host could look at and that do
        not come there: the step that takes them finds its latents not to be finite.
        """
        inputs = {tensor.name: self.backend.to_device(arrays[tensor.name]) for tensor in self.spec.inputs}
        with clock:
            outputs = self.engine.run(inputs)
        found = {
            name: Resident(self.backend, buffer) if self.backend.keeps and name in kept else self.backend.to_host(buffer)
            for name, buffer in outputs.items()
        }
        for tensor in self.spec.outputs:
            if not fits(tensor.shape, found[tensor.name].shape):
                raise EngineError(
                    f"{self.engine.name} engine: its output {tensor.name} has the shape {list(found[tensor.name].shape)} where "
                    f"the manifest says {list(tensor.shape)}; build the bundle again with `mc-runtime build`"
                )
        for name, result in found.items():
            if not self._is_finite(result):
                mend = f"rebuild it in another precision than {self.spec.precision.value}"
                if self.spec.lora:
                    mend = f"lower the scales of the LoRAs, or {mend}"
                raise EngineError(f"{self.engine.name} engine: its output {name} is not finite; {mend}")
        return found

    def _is_finite(self, result: Array | Resident) -> bool:
        if isinstance(result, Resident):
            return not self.backend.looks_there or self.backend.is_finite(result.buffer)
        return all_finite(result)


class Engines:
    """Loads on first use, or ahead of it with `start`."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self._bundle = bundle
        self._settings = settings
        self._backends: dict[str, Backend] = {}
        self._loading: dict[str, Future[LoadedEngine]] = {}
        self._lock = threading.Lock()
        self._creating = threading.Lock()

    def check(self) -> None:
        """Import the libraries that the bundle's engines need, and ask them whether they run these engines on this machine.

        Raises BundleError or EngineError where a library cannot be imported or says no, or where a device has no room.
        """
        targets: dict[str, dict[str, EngineSpec]] = {}
        for component in self._bundle.manifest.required_components():
            spec = self._bundle.manifest.engines[component]
            files = tuple(self._bundle.file(name) for name in spec.files)
            self._backend(spec.target).check(component, files, spec)
            targets.setdefault(spec.target, {})[component] = spec
        for target, specs in targets.items():
            self._backend(target).admit(specs)

    def start(self, components: Mapping[str, Shapes | None]) -> dict[str, Future[LoadedEngine]]:
        """Begin to load these engines, each in its own thread; `get` waits for one.

        Where the shapes of an engine's inputs are known already, it prepares itself for them right after loading. One that did
        not load for an earlier request, which may have failed for another one's sake and never asked for it, is tried again.
        """
        with self._lock:
            missing = {name: shapes for name, shapes in components.items() if _failed(self._loading.get(name))}
            if missing:
                pool = ThreadPoolExecutor(len(missing), thread_name_prefix="load-engine")
                self._loading |= {name: pool.submit(self._load, name, shapes) for name, shapes in missing.items()}
                pool.shutdown(wait=False)
            return {name: self._loading[name] for name in components}

    def get(self, component: str) -> LoadedEngine:
        """The loaded engine. Raises EngineError where it does not load, BundleError where the bundle has none.

        What did not load is tried again by the next request: a GPU that was full may have room by then.
        """
        with self._lock:
            loading = self._loading.get(component)
        if loading is None:
            loading = self.start({component: None})[component]
        try:
            return loading.result()
        except Exception:
            with self._lock:
                if self._loading.get(component) is loading:
                    del self._loading[component]
            raise

    def wait_for(self, components: Iterable[str], work: Work, shapes: Mapping[str, Shapes] | None = None) -> None:
        """Count what is left of loading these engines as loading, not as the stage that needs them."""
        with work.stopwatch.stage("load"):
            for component in components:
                loaded = self.get(component)
                if shapes and component in shapes:
                    loaded.engine.prepare(shapes[component])

    def _load(self, component: str, shapes: Shapes | None) -> LoadedEngine:
        spec = self._bundle.manifest.engines.get(component)
        if spec is None:
            raise BundleError(f"{self._bundle.path}: has no {component} engine; build the bundle with one")
        backend = self._backend(spec.target)
        engine = backend.load(component, tuple(self._bundle.file(name) for name in spec.files), spec)
        self._check_tensors(engine, spec)
        if shapes is not None:
            engine.prepare(shapes)
        return LoadedEngine(spec, backend, engine)

    def _backend(self, target: str) -> Backend:
        with self._creating:  # engines of one target share a device's buffers: two that load at once must find one backend
            if target not in self._backends:
                self._backends[target] = create_backend(target, self._settings)
            return self._backends[target]

    def _check_tensors(self, engine: Engine, spec: EngineSpec) -> None:
        """The file and the manifest must agree on what goes in and comes out."""
        for kind, found, listed in zip(("inputs", "outputs"), engine.describe(), (spec.inputs, spec.outputs), strict=True):
            names, expected = sorted(tensor.name for tensor in found), sorted(tensor.name for tensor in listed)
            if names != expected:
                raise BundleError(
                    f"{engine.path}: {kind} {names} where the manifest says {expected}; "
                    "build the bundle again with `mc-runtime build`"
                )
            there = {tensor.name: tensor for tensor in found}
            for tensor in listed:
                its = there[tensor.name]
                pairs = (
                    (its.dtype, tensor.dtype, its.dtype == tensor.dtype),
                    (list(its.shape), list(tensor.shape), _agree(its.shape, tensor.shape)),
                )
                for one, other, same in pairs:
                    if not same:
                        raise BundleError(
                            f"{engine.path}: {tensor.name} is {one} where the manifest says {other}; "
                            "build the bundle again with `mc-runtime build`"
                        )


def _failed(loading: Future[LoadedEngine] | None) -> bool:
    """Whether nothing is loaded, and nothing is about to be."""
    return loading is None or (loading.done() and loading.exception() is not None)


def _agree(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    """Whether two shapes have no dimension of two sizes; a library names dynamic ones as it likes."""
    sizes = (pair for pair in zip(one, other, strict=False) if all(isinstance(size, int) for size in pair))
    return len(one) == len(other) and all(size == its for size, its in sizes)


def fits(listed: Sequence[int | str], found: Sequence[int]) -> bool:
    """Whether an array of the shape `found` is what the manifest lists; a string is any size."""
    return len(listed) == len(found) and all(
        isinstance(size, str) or size == other for size, other in zip(listed, found, strict=True)
    )


def fixed(spec: EngineSpec, name: str, axis: int) -> int | None:
    """The size of an input's dimension where the engine has it fixed; None where it is dynamic or no such input is."""
    tensor = spec.input(name)
    size = tensor.shape[axis] if tensor else None
    return size if isinstance(size, int) else None


def padded(array: Array, axis: int, size: int) -> Array:
    """The array with zeros at the end of an axis up to `size`."""
    if array.shape[axis] == size:
        return array
    result = np.zeros((*array.shape[:axis], size, *array.shape[axis + 1 :]), array.dtype)
    result[(slice(None),) * axis + (slice(array.shape[axis]),)] = array
    return result
