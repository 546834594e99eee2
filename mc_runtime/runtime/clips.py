"""Clips through the autoencoder's engines, chunk by chunk: of any length, in the memory of one chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Array, Buffer
from mc_runtime.bundle.dimensions import extents_in, sizes_of
from mc_runtime.errors import EngineError, RequestError
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import EngineClock

Floats = NDArray[np.float32]
_Run = Callable[[Array], Floats]


class ChunkWatch(Protocol):
    """Who looks on while a clip goes through."""

    def before_chunk(self) -> None:
        """Raise Cancelled where the caller has had enough."""

    def after_chunk(self, frames: int, seconds: float) -> None:
        """Hear of a finished chunk: how many pixel frames it was, and how long it took."""


class Codec(NamedTuple):
    """The engines of one direction: of a clip's first chunk, and of every next one where those differ."""

    first: LoadedEngine
    following: LoadedEngine | None = None

    @property
    def knows_clips(self) -> bool:
        """Whether its tensors have an axis of frames; otherwise frames are pictures to it."""
        return len(self.first.spec.inputs[0].shape) == 5


def decode_clip(
    codec: Codec, latents: Array, clock: EngineClock, watch: ChunkWatch, *, chunk: int | None = None
) -> Iterator[Floats]:
    """Pixels f32 `[B, f, h, w, 3]` in [0, 1] of latents `[B, C, T, H, W]`, as they come; each array is the caller's own.

    An autoencoder with caches takes one latent frame after another, which does not show in the result. One without takes
    `chunk` of them at once (None: all): to a picture autoencoder that is a matter of memory only; Stable Video Diffusion's
    decoder mixes the frames of a chunk, and gives what `decode_chunk_size` of the published pipeline does for each clip alone.

    Raises:
        EngineError: an engine fails, or gives pixels that are not finite.
        RequestError: `chunk` is less than 1.
        Cancelled: from the watch.
    """
    if chunk is not None and chunk < 1:
        raise RequestError(f"a chunk has at least 1 frame, got {chunk}")
    run: _Run
    if codec.following is not None:
        run, size = _CachedRun(codec.first, codec.following, clock).advance, 1
    else:
        run, size = _plain_run(codec, "latents", "pixels", clock), chunk or latents.shape[2]
    for start in range(0, latents.shape[2], size):
        watch.before_chunk()
        began = time.perf_counter()
        pixels = run(latents[:, :, start : start + size])
        watch.after_chunk(pixels.shape[1], time.perf_counter() - began)
        yield pixels


def encode_clip(codec: Codec, frames: Iterable[Array], clock: EngineClock, watch: ChunkWatch) -> Floats:
    """Latents f32 `[B, C, T, H, W]` of a clip's frames, each `[B, h, w, 3]` in [0, 1]; they may come from a reader.

    Raises:
        EngineError: an engine fails, or gives latents that are not finite.
        RequestError: no frames, or so many that no whole number of latent frames stands for them.
        Cancelled: from the watch.
    """
    run: _Run
    if codec.following is not None:
        run = _CachedRun(codec.first, codec.following, clock).advance
        size = int(codec.following.spec.inputs[0].shape[1])
    else:
        run, size = _plain_run(codec, "pixels", "latents", clock), 1
    made: list[Floats] = []
    for pixels in _chunks(frames, size):
        watch.before_chunk()
        began = time.perf_counter()
        made.append(run(pixels))
        watch.after_chunk(pixels.shape[1], time.perf_counter() - began)
    return np.concatenate(made, axis=2)


def _chunks(frames: Iterable[Array], size: int) -> Iterator[Array]:
    """The first frame, then `size` at a time, as `[B, f, h, w, 3]`."""
    held: list[Array] = []
    count = 0
    for frame in frames:
        held.append(frame)
        if len(held) == (size if count else 1):
            yield np.stack(held, axis=1)
            count, held = count + len(held), []
    if not count:
        raise RequestError("a clip has at least 1 frame, got none")
    if held:
        raise RequestError(
            f"{count + len(held)} frames: this autoencoder takes 1 + a multiple of {size}; the nearest are {count} and "
            f"{count + size}"
        )


def _plain_run(codec: Codec, taken: str, given: str, clock: EngineClock) -> _Run:
    """A run that keeps nothing: of frames together, or of each as a picture."""
    frames_in, frames_out = (2 if name == "latents" else 1 for name in (taken, given))

    def together(chunk: Array) -> Floats:
        return codec.first.run({taken: np.ascontiguousarray(chunk)}, clock)[given].copy()

    def as_pictures(chunk: Array) -> Floats:
        batch, frames = chunk.shape[0], chunk.shape[frames_in]
        folded = np.moveaxis(chunk, frames_in, 1).reshape(batch * frames, *np.delete(chunk.shape, [0, frames_in]))
        made = codec.first.run({taken: folded}, clock)[given]
        return np.moveaxis(made.reshape(batch, frames, *made.shape[1:]), 1, frames_out).copy()

    return together if codec.knows_clips else as_pictures


class _CachedRun:
    """A clip on its way through a pair of engines. What one chunk leaves stays in the backend's buffers, two sets of them that
    are written and read in turn; nothing else is kept, however long the clip."""

    def __init__(self, first: LoadedEngine, following: LoadedEngine, clock: EngineClock) -> None:
        self._engines = (first, following)
        self._clock = clock
        self._caches: tuple[dict[str, Buffer], dict[str, Buffer]] = ({}, {})
        self._done = 0

    def advance(self, chunk: Array) -> Floats:
        """The next chunk's result.

        Raises:
            EngineError: it is not finite, or the engine fails.
        """
        loaded = self._engines[min(self._done, 1)]
        backend, (main, *_) = loaded.backend, loaded.spec.inputs
        extents = extents_in(main.shape, chunk.shape)
        if not self._done:
            self._caches = self._empty(extents), self._empty(extents)
        read, written = self._caches[self._done % 2], self._caches[1 - self._done % 2]
        given = loaded.spec.outputs[0]
        result = backend.empty(sizes_of(given.shape, extents))
        inputs = {main.name: backend.to_device(np.ascontiguousarray(chunk))}
        if self._done:
            inputs |= read
        outputs = {given.name: result, **{f"next_{name}": buffer for name, buffer in written.items()}}
        call = loaded.engine.bind(inputs, outputs)
        with self._clock:
            call.run()
        if not backend.is_finite(result):
            raise EngineError(
                f"{loaded.engine.name} engine: its output {given.name} is not finite; "
                f"rebuild it in another precision than {loaded.spec.precision.value}"
            )
        self._done += 1
        return np.array(backend.to_host(result))

    def _empty(self, extents: dict[str, int]) -> dict[str, Buffer]:
        first, following = self._engines
        return {spec.name: first.backend.empty(sizes_of(spec.shape, extents)) for spec in following.spec.inputs[1:]}
