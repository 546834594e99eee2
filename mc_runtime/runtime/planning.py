"""From a prompt to a plan: token ids, then vision tower, planner and text encoder, once for every content."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.backends.base import Array
from mc_runtime.backends.resident import Resident
from mc_runtime.bundle.arrays import load_arrays
from mc_runtime.bundle.manifest import Component
from mc_runtime.bundle.manifest import Engine as EngineSpec
from mc_runtime.bundle.store import Bundle
from mc_runtime.errors import BundleError
from mc_runtime.lora import PLAIN, ActiveLora
from mc_runtime.prompting.pixels import Media
from mc_runtime.prompting.positions import Grid, canvas_positions
from mc_runtime.prompting.tokenizer import Encoded, Prompter
from mc_runtime.prompting.vision import Seen, look_at, tower_inputs
from mc_runtime.runtime.engines import Engines, LoadedEngine, fits, fixed, padded
from mc_runtime.runtime.plan import Branch, ContentCache
from mc_runtime.runtime.work import EngineClock

CACHE_BYTES = 256 * 2**20
_KEPT = ("context",)
"""Outputs that only a step reads; keys and values for all blocks may be hundreds of megabytes."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One text's token ids, for every model of every engine that reads text.

    `context` is of the model whose rows become the context, None where a picture's embedding does; `is_empty_negative` may be
    served by the stored plan; `seen` are the pictures and clips that the planner reads with it; `picture` f32 `[h, w, 3]` is
    what the image encoder embeds; `lora` are the adapters that the engines run with.
    """

    by_engine: Mapping[Component, tuple[Encoded, ...]]
    context: Encoded | None
    is_empty_negative: bool
    seen: tuple[Seen, ...] = ()
    picture: Array | None = None
    lora: ActiveLora = PLAIN


@dataclass(frozen=True)
class _Outputs:
    """What an engine gave for one text, as the cache keeps it."""

    arrays: dict[str, Any]  # arrays, or Residents

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


class Planning:
    """Plans one text at a time, so that a plan depends on its own prompt alone, whatever it is planned together with."""

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self._bundle = bundle
        self._engines = engines
        self._cache = ContentCache(CACHE_BYTES)
        prompting = bundle.manifest.prompting
        specs = {"planner": [prompting.planner], "text_encoder": [prompting.text_encoder, prompting.text_encoder_2]}
        self._prompters = {
            component: tuple(Prompter(spec, bundle.path) for spec in of_engine if spec)
            for component, of_engine in specs.items()
            if component in bundle.manifest.required_components()
        }
        self._empty: dict[str, Array] | None = None

    def forget(self) -> None:
        """Empty the cache."""
        self._cache = ContentCache(CACHE_BYTES)

    def components(self, texts: Iterable[EncodedPrompt]) -> tuple[Component, ...]:
        """The engines that plans of these texts, all with the same adapters, need."""
        texts = list(texts)
        vision = ("vision",) if any(text.seen for text in texts) else ()
        encoder = ("image_encoder",) if self._bundle.manifest.conditioning == "image_encoder" else ()
        return (*vision, *(texts[0].lora.engine(name) for name in (*encoder, *self._prompters)))

    def look(self, media: Sequence[Media]) -> tuple[Seen, ...]:
        """Pictures and clips, resized and counted, for `encode`; none where there is no planner that sees.

        Raises:
            RequestError: they are too many, too large or too narrow.
        """
        spec = self._bundle.manifest.prompting.planner
        return look_at(media, spec.vision) if spec and spec.vision else ()

    def encode(
        self,
        text: str,
        *,
        negative: bool = False,
        seen: Sequence[Seen] = (),
        picture: Array | None = None,
        lora: ActiveLora = PLAIN,
    ) -> EncodedPrompt:
        """Token ids of a text, for the planner behind what `look` saw. Raises RequestError where it is too long."""
        encoded = {
            name: tuple(
                prompter.encode([text], negative=negative, seen=seen if name == "planner" else ()) for prompter in prompters
            )
            for name, prompters in self._prompters.items()
        }
        conditioning = self._bundle.manifest.conditioning
        empty = negative and not text and not seen
        if conditioning == "image_encoder":
            return EncodedPrompt(encoded, None, negative, tuple(seen), picture, lora)
        of_context = zip(self._prompters[conditioning], encoded[conditioning], strict=True)
        context = next(found for prompter, found in of_context if prompter.spec.gives_context)
        return EncodedPrompt(encoded, context, empty, tuple(seen), lora=lora)

    def rows(self, prompt: EncodedPrompt, size: tuple[int, int]) -> int:
        """How many context rows the branch of this text will have."""
        stored = self._stored(prompt, self.grid(size))
        if stored is not None:
            return len(stored.context)
        return 1 if prompt.context is None else _last_row(prompt.context)

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int] | None:
        """The canvas grid of a picture of (height, width) pixels; None for a stock pipeline."""
        canvas = self._bundle.manifest.canvas
        return canvas.grid_for(size) if canvas else None

    def branch(self, prompt: EncodedPrompt, size: tuple[int, int], clock: EngineClock) -> Branch:
        """What the step engine is told of this text, for a picture of (height, width) pixels."""
        manifest = self._bundle.manifest
        grid = self.grid(size)
        stored = self._stored(prompt, grid)
        if stored is not None:
            return stored
        zeros = prompt.is_empty_negative and manifest.guidance.zero_negative
        needed = [name for name in prompt.by_engine if name == "planner" or not zeros]
        outputs = {name: self._outputs(name, prompt, grid, clock) for name in needed}
        canvas = outputs["planner"]["canvas"] if grid else None
        mask = np.ones(1, np.int64) if prompt.context is None else prompt.context.context_mask[0]
        rows = self.rows(prompt, size)
        if zeros:
            return self._zeros(mask[:rows], canvas)
        given = self._embedded(prompt, clock) if prompt.context is None else outputs[manifest.conditioning]
        return Branch(given["context"][:rows], mask[:rows], canvas, given.get("pooled"))

    def _zeros(self, mask: NDArray[np.int64], canvas: Array | None) -> Branch:
        """Zeros as wide as the step engine takes context and pooled vector."""
        step = self._bundle.manifest.engines["step"]
        pooled = step.input("pooled")
        return Branch(
            np.zeros((len(mask), fixed(step, "context", 3) or 0), np.float32),
            mask,
            canvas,
            np.zeros(fixed(step, "pooled", 2) or 0, np.float32) if pooled else None,
        )

    def _embedded(self, prompt: EncodedPrompt, clock: EngineClock) -> dict[str, Any]:
        """What the image encoder makes of a prompt's picture, kept by content."""
        picture, lora = prompt.picture, prompt.lora
        assert picture is not None, "the request's task gives a picture"
        engine = self._engines.get(lora.engine("image_encoder"))
        rows = np.repeat(picture[None], fixed(engine.spec, "pixels", 0) or 1, axis=0)
        content = (picture.shape, hashlib.sha256(picture.tobytes()).digest())
        key = (self._bundle.digest, "image_encoder", content, lora.digest if lora.of("image_encoder") else "")
        inputs = {"pixels": rows, **lora.of("image_encoder")}

        def run() -> _Outputs:
            return _Outputs(_one(engine, inputs, clock))

        outputs: _Outputs = self._cache.get_or_make(key, run)
        return outputs.arrays

    def _stored(self, prompt: EncodedPrompt, grid: tuple[int, int, int] | None) -> Branch | None:
        """The empty prompt's branch from the bundle, where this is one, and the bundle has one for this grid."""
        name = self._bundle.manifest.empty_plan
        changed = any(prompt.lora.of(component) for component in self._prompters)
        if name is None or not prompt.is_empty_negative or changed:
            return None
        if self._empty is None:
            self._empty = _empty_plan(self._bundle.file(name), self._bundle.manifest.engines["step"])
        canvas = self._empty.get("canvas")
        if (None if canvas is None else canvas.shape[:3]) != grid:
            return None
        return Branch(self._empty["context"], self._empty["context_mask"], canvas, self._empty.get("pooled"))

    def _outputs(
        self, component: Component, prompt: EncodedPrompt, grid: tuple[int, int, int] | None, clock: EngineClock
    ) -> dict[str, Any]:
        """Outputs without the batch dimension, from the cache where this content was seen before."""
        encoded = prompt.by_engine[component]
        content: Hashable = tuple((text.input_ids.tobytes(), text.select.tobytes()) for text in encoded)
        if component == "planner":
            pictures = tuple(one.digest for one in prompt.seen)
            content = (content, grid, encoded[0].position_ids.tobytes(), pictures)
        lora = prompt.lora.digest if prompt.lora.of(component) else ""
        key = (self._bundle.digest, component, content, lora)
        outputs: _Outputs = self._cache.get_or_make(key, lambda: self._run(component, prompt, grid, clock))
        return outputs.arrays

    def _run(
        self, component: Component, prompt: EncodedPrompt, grid: tuple[int, int, int] | None, clock: EngineClock
    ) -> _Outputs:
        engine = self._engines.get(prompt.lora.engine(component))
        inputs = _inputs(engine, prompt.by_engine[component], grid) | dict(prompt.lora.of(component))
        rows = engine.spec.input("vision")
        if rows is not None:
            width = rows.shape[1]
            assert isinstance(width, int)
            # An engine has no empty inputs: a text alone has one row that no token asks for.
            inputs["vision"] = self._vision(prompt.seen, clock) if prompt.seen else np.zeros((1, width), np.float32)
        return _Outputs(_one(engine, inputs, clock))

    def _vision(self, seen: Sequence[Seen], clock: EngineClock) -> Array:
        """Embeddings f32 `[n, D]` of pictures and clips in the order of their tokens; each is run alone and kept by content."""
        spec = self._bundle.manifest.prompting.planner
        assert spec is not None
        assert spec.vision is not None
        vision = spec.vision

        def run(one: Seen) -> _Outputs:
            return _Outputs(self._engines.get("vision").run(tower_inputs([one], vision), clock))

        kept = [self._cache.get_or_make((self._bundle.digest, "vision", one.digest), partial(run, one)) for one in seen]
        return np.concatenate([outputs.arrays["vision"] for outputs in kept])


def _one(engine: LoadedEngine, inputs: Mapping[str, Array], clock: EngineClock) -> dict[str, Array | Resident]:
    """The first of a batch's outputs, each in memory of its own; the context stays on the device where it can."""
    outputs = engine.run_keeping(_KEPT, inputs, clock)
    return {name: array[0] if isinstance(array, Resident) else np.array(array[0]) for name, array in outputs.items()}


def _empty_plan(path: Path, step: EngineSpec) -> dict[str, Array]:
    """The stored plan's arrays, each what the step engine takes for one branch. Raises BundleError."""
    arrays = load_arrays(path)
    rows = len(arrays["context"]) if "context" in arrays and arrays["context"].ndim else 0
    for name in ("context", "context_mask", "canvas", "pooled"):
        tensor = step.input(name)
        if tensor is None:
            continue
        # Of an engine's [B, G, ...]; rows of context are filled up later where the engine wants more.
        wanted = (max(1, rows), *tensor.shape[3:]) if name.startswith("context") else tensor.shape[2:]
        array = arrays.get(name)
        if array is None or array.dtype != tensor.dtype or not fits(wanted, array.shape) or not np.isfinite(array).all():
            raise BundleError(
                f"{path}: {name} is not the finite {tensor.dtype} {list(wanted)} that the step engine takes; "
                "build the bundle again with `mc-runtime build`"
            )
    return arrays


def _last_row(encoded: Encoded) -> int:
    """Context rows up to the last one that counts."""
    return int(encoded.context_mask[0].nonzero()[0].max(initial=0)) + 1


def _inputs(engine: LoadedEngine, encoded: Sequence[Encoded], grid: tuple[int, int, int] | None) -> dict[str, Array]:
    """The engine's inputs for one text, filled up where the engine has its batch or its length fixed."""
    inputs: dict[str, Array] = {}
    axes: dict[str, int] = {}
    for index, text in enumerate(encoded):
        suffix = f"_{index + 1}" if index else ""
        length = fixed(engine.spec, f"input_ids{suffix}", 1) or text.input_ids.shape[1]
        rows = fixed(engine.spec, f"select{suffix}", 0) or len(text.select)
        inputs |= {
            f"input_ids{suffix}": padded(text.input_ids, 1, length),
            f"attention_mask{suffix}": padded(text.attention_mask, 1, length),
            f"position_ids{suffix}": padded(text.position_ids, 2, length),
            f"vision_index{suffix}": padded(text.vision_index + 1, 1, length) - 1,  # filled up with -1, no row
            f"select{suffix}": padded(text.select, 0, rows),
        }
        of_batch = {"input_ids": 0, "attention_mask": 0, "position_ids": 1, "vision_index": 0}
        axes |= {f"{name}{suffix}": axis for name, axis in of_batch.items()}
    if grid is not None:
        inputs["canvas_position_ids"] = canvas_positions(encoded[0].starts, Grid(*grid))
        axes["canvas_position_ids"] = 1
    batch = fixed(engine.spec, "input_ids", 0) or 1
    return {name: np.repeat(array, batch, axis=axes[name]) if name in axes else array for name, array in inputs.items()}
