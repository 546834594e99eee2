"""Clips chunk by chunk: the caches of one chunk reach the next, and memory does not grow with the clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mc_runtime.backends.base import Buffer, Call, Engine, HostBackend, Settings
from mc_runtime.bundle.dimensions import extents_in, sizes_of
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.manifest import Precision, Tensor
from mc_runtime.errors import Cancelled, EngineError, RequestError
from mc_runtime.runtime.clips import Codec, decode_clip, encode_clip
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import EngineClock, Work

CACHE = ("B", 1, 1, "H", "W")
STRIDE = 2


def decoded(latents, cache):
    """Every frame of a chunk: the latents over 100, and a tenth of what the chunk before left."""
    frames = 1 if cache is None else STRIDE
    cache = np.zeros_like(latents) if cache is None else cache
    value = latents / 100 + cache / 10
    shown = np.repeat(np.repeat(value[:, 0], 2, axis=-1), 2, axis=-2)
    pixels = np.repeat(np.repeat(shown, frames, axis=1)[..., None], 3, axis=-1)
    return pixels, latents - cache


def encoded(pixels, cache):
    value = pixels[:, :, ::2, ::2, 0].sum(axis=1)[:, None, None]
    return value + (0 if cache is None else cache), value


class Computed(Engine):
    """An engine that is a function of numpy."""

    def __init__(self, name, spec, function):
        super().__init__(name, Path("nowhere"))
        self.spec, self.function = spec, function

    def describe(self):
        return self.spec.inputs, self.spec.outputs

    def bind(self, inputs, outputs):
        assert {tensor.name for tensor in self.spec.inputs} == set(inputs)
        assert {tensor.name for tensor in self.spec.outputs} == set(outputs)
        engine = self

        class Bound(Call):
            def run(self):
                made = engine.function(*(inputs[tensor.name].array for tensor in engine.spec.inputs))
                for tensor, array in zip(engine.spec.outputs, made, strict=True):
                    np.copyto(outputs[tensor.name].array, array)

        return Bound()

    def run(self, inputs):
        made = self.function(*(inputs[tensor.name].array for tensor in self.spec.inputs))
        return {t.name: Buffer(None, a.shape, a.dtype, a) for t, a in zip(self.spec.outputs, made, strict=True)}


class NumpyBackend(HostBackend):
    """Counts the caches it makes."""

    name = "numpy"

    def __init__(self):
        super().__init__(Settings())
        self.caches = 0

    def load(self, component, files, spec):
        raise AssertionError

    def wrap(self, array):
        return array

    def empty(self, shape, dtype="float32"):
        self.caches += len(shape) == 5 and shape[1] == 1 and shape[-1] != 3
        return super().empty(shape, dtype)


def tensor(name, *shape):
    return Tensor(name=name, dtype="float32", shape=shape)


def loaded(backend, name, inputs, outputs, function) -> LoadedEngine:
    spec = EngineSpec(target="numpy", precision=Precision.FP32, files=("x",), inputs=tuple(inputs), outputs=tuple(outputs))
    return LoadedEngine(spec, backend, Computed(name, spec, function))


def causal(backend) -> tuple[Codec, Codec]:
    """A decoder and an encoder with a cache, 2 frames and 2 x 2 pixels a latent cell."""
    latents, cache, given = tensor("latents", "B", 1, 1, "H", "W"), tensor("cache_00", *CACHE), tensor("next_cache_00", *CACHE)

    def pixels(frames):
        return tensor("pixels", "B", frames, "2*H", "2*W", 3)

    decoder = Codec(
        loaded(backend, "vae_decoder", [latents], [pixels(1), given], lambda z: decoded(z, None)),
        loaded(backend, "vae_decoder_next", [latents, cache], [pixels(STRIDE), given], decoded),
    )
    encoder = Codec(
        loaded(backend, "vae_encoder", [pixels(1)], [latents, given], lambda p: encoded(p, None)),
        loaded(backend, "vae_encoder_next", [pixels(STRIDE), cache], [latents, given], encoded),
    )
    return decoder, encoder


def latents_of(frames, batch=2):
    return np.random.default_rng(frames).standard_normal((batch, 1, frames, 3, 5), dtype=np.float32)


def by_hand(function, chunks):
    made, cache = [], None
    for chunk in chunks:
        result, cache = function(chunk, cache)
        made.append(result)
    return made


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_caches_go_from_chunk_to_chunk(frames: int) -> None:
    decoder, encoder = causal(NumpyBackend())
    latents, work = latents_of(frames), Work()
    chunks = list(decode_clip(decoder, latents, work.clock, work))
    assert [chunk.shape[1] for chunk in chunks] == [1] + [STRIDE] * (frames - 1)
    expected = np.concatenate(by_hand(decoded, [latents[:, :, [t]] for t in range(frames)]), axis=1)
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)
    assert work.frames == expected.shape[1] == 1 + (frames - 1) * STRIDE
    back = encode_clip(encoder, np.moveaxis(expected, 1, 0), work.clock, work)
    parts = [expected[:, :1]] + [expected[:, 1 + STRIDE * t : 1 + STRIDE * (t + 1)] for t in range(frames - 1)]
    np.testing.assert_array_equal(back, np.concatenate(by_hand(encoded, parts), axis=2))


def test_memory_does_not_grow_with_the_clip() -> None:
    """Two sets of caches, whatever the length; and a chunk's pixels are nobody's once the caller dropped them."""
    counts = []
    for frames in (3, 30):
        backend = NumpyBackend()
        work = Work()
        for _ in decode_clip(causal(backend)[0], latents_of(frames), work.clock, work):
            pass
        counts.append(backend.caches)
    assert counts == [2, 2]


def test_a_clip_is_cancelled_between_chunks() -> None:
    decoder, _ = causal(NumpyBackend())
    seen: list[int] = []
    work = Work(cancel=lambda: len(seen) == 2)
    chunks = decode_clip(decoder, latents_of(5), work.clock, work)
    seen += [next(chunks).shape[1], next(chunks).shape[1]]
    with pytest.raises(Cancelled):
        next(chunks)
    assert seen == [1, STRIDE]


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_a_picture_decoder_takes_frames_as_pictures(chunk: int | None) -> None:
    backend = NumpyBackend()

    def picture(latents):
        return (np.moveaxis(np.repeat(latents, 2, axis=1)[:, :3], 1, -1) / 4,)

    engine = loaded(
        backend, "vae_decoder", [tensor("latents", "B", 2, "H", "W")], [tensor("pixels", "B", "h", "w", 3)], picture
    )
    latents = np.random.default_rng(0).standard_normal((2, 2, 5, 3, 4), dtype=np.float32)
    work = Work()
    made = np.concatenate(list(decode_clip(Codec(engine), latents, work.clock, work, chunk=chunk)), axis=1)
    expected = np.stack([picture(latents[:, :, t])[0] for t in range(5)], axis=1)
    np.testing.assert_array_equal(made, expected)
    assert work.frames == 5


def test_a_picture_encoder_takes_frames_one_by_one() -> None:
    engine = loaded(
        NumpyBackend(), "vae_encoder", [tensor("pixels", "B", "h", "w", 3)], [tensor("latents", "B", 3, "H", "W")],
        lambda pixels: (np.ascontiguousarray(np.moveaxis(pixels, -1, 1)),),
    )  # fmt: skip
    frames = np.random.default_rng(0).random((4, 2, 3, 5, 3), dtype=np.float32)
    work = Work()
    latents = encode_clip(Codec(engine), iter(frames), work.clock, work)
    np.testing.assert_array_equal(latents, np.moveaxis(frames, (0, 1, -1), (2, 0, 1)))


def test_a_decoder_of_clips_takes_frames_together() -> None:
    taken: list[int] = []

    def mixed(latents):
        taken.append(latents.shape[2])
        pixels = np.repeat(np.moveaxis(latents, 1, -1), 3, axis=-1)
        return (pixels - pixels.mean(axis=1, keepdims=True),)

    engine = loaded(
        NumpyBackend(),
        "vae_decoder",
        [tensor("latents", "B", 1, "T", "H", "W")],
        [tensor("pixels", "B", "T", "H", "W", 3)],
        mixed,
    )
    work, latents = Work(), latents_of(5)
    made = list(decode_clip(Codec(engine), latents, work.clock, work, chunk=2))
    assert taken == [2, 2, 1]
    np.testing.assert_allclose(made[0], mixed(latents[:, :, :2])[0])
    (whole,) = decode_clip(Codec(engine), latents, work.clock, work)
    np.testing.assert_allclose(whole, mixed(latents)[0])


@pytest.mark.parametrize(
    ("count", "message"), [(0, "at least 1 frame"), (2, "nearest are 1 and 3"), (6, "nearest are 5 and 7")]
)
def test_frames_that_do_not_fit_are_refused(count: int, message: str) -> None:
    _, encoder = causal(NumpyBackend())
    frames = [np.zeros((1, 6, 4, 3), np.float32)] * count
    with pytest.raises(RequestError, match=message):
        encode_clip(encoder, frames, EngineClock(), Work())


def test_numbers_that_are_not_finite_are_refused() -> None:
    decoder, _ = causal(NumpyBackend())
    latents = latents_of(3)
    latents[0, 0, 1, 0, 0] = np.nan
    work = Work()
    chunks = decode_clip(decoder, latents, work.clock, work)
    next(chunks)
    with pytest.raises(EngineError, match="vae_decoder_next engine: its output pixels is not finite"):
        next(chunks)


def test_a_chunk_of_no_frames_is_refused() -> None:
    decoder, _ = causal(NumpyBackend())
    with pytest.raises(RequestError, match="at least 1 frame"):
        next(decode_clip(decoder, latents_of(2), EngineClock(), Work(), chunk=0))


def test_dimensions_are_names_and_multiples() -> None:
    shape = ("B", 4, "8*H", "W")
    assert extents_in(shape, (2, 4, 24, 5)) == {"B": 2, "H": 3, "W": 5}
    assert sizes_of(shape, {"B": 2, "H": 3, "W": 5}) == (2, 4, 24, 5)
    for wrong in ((2, 4, 25, 5), (2, 3, 24, 5), (2, 4, 24)):
        with pytest.raises(ValueError, match="does not fit"):
            extents_in(shape, wrong)
    with pytest.raises(ValueError, match="does not fit"):
        extents_in(("H", "2*H"), (3, 8))
