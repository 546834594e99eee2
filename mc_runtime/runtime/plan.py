"""Plans: everything about a request that does not depend on the noise or the step, made once and kept by content."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import RequestError
from mc_runtime.lora import PLAIN, ActiveLora

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.backends.resident import Resident


@dataclass(frozen=True, eq=False)
class Branch:
    """What one guidance branch tells the step engine.

    Attributes:
        context: f32 `[L, D_ctx]`, the rows that cross-attention reads, without padding at the end; on a GPU where the planner
            left them there, and by `np.asarray` on the host.
        context_mask: i64 `[L]`, 1 where a row counts.
        canvas: f32 `[t, h, w, D_b]`, the layout the planner drew; None for a stock pipeline.
        pooled: f32 `[P]`, for a backbone that takes a vector beside its context.
    """

    context: NDArray[np.float32] | Resident
    context_mask: NDArray[np.int64]
    canvas: NDArray[np.float32] | None
    pooled: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        optional = (array.nbytes for array in (self.canvas, self.pooled) if array is not None)
        return self.context.nbytes + self.context_mask.nbytes + sum(optional)


@dataclass(frozen=True, eq=False)
class Plan:
    """One prompt, planned for one picture size; render it with as many seeds as wanted.

    Attributes:
        prompt, negative_prompt: the texts.
        size: (height, width) in pixels.
        branches: the prompt's branch, and the negative prompt's where guidance can use it.
        bundle: digest of the bundle that made it; another bundle cannot render it.
        task: what was asked for.
        inputs: the task's own arguments, such as pictures, as they were given.
        lora: the adapters it was made with, and is rendered with.
    """

    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    branches: tuple[Branch, ...]
    bundle: str
    task: str = "text-to-image"
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lora: ActiveLora = PLAIN

    def canvas_map(self) -> Image.Image:
        """The layout as a picture: the first three principal components of the canvas as red, green and blue.

        Raises RequestError where the bundle draws no canvas (a stock pipeline).
        """
        from mc_runtime.media.canvas_map import canvas_map

        canvas = self.branches[0].canvas
        if canvas is None:
            raise RequestError("this plan has no canvas: the bundle was built from a stock pipeline")
        return canvas_map(canvas, size=self.size)


class ContentCache:
    """The least recently used values go when their bytes pass the limit. Safe for several threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = 0
        self._lock = threading.Lock()
        self._items: OrderedDict[Hashable, Any] = OrderedDict()

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value under `key`, made now if it is not kept; values have `nbytes`."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key]
        value = make()
        with self._lock:
            if key not in self._items:
                self._items[key] = value
                self._used += value.nbytes
            while self._used > self._limit and len(self._items) > 1:
                _, oldest = self._items.popitem(last=False)
                self._used -= oldest.nbytes
        return value

    def __len__(self) -> int:
        return len(self._items)
