"""The canvas as a picture: its first three principal components as red, green and blue (paper, figures 5, 16 and 17)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.errors import EngineError

SIDE = 512
"""Longer side, in pixels, of a map whose size is not asked for."""
GAP = 4
PERCENTILES = (2, 98)
FLAT = 1e-5
"""A component whose spread is below this share of the first one's is noise, and drawn grey."""


def canvas_map(canvas: NDArray[np.float32], size: tuple[int, int] | None = None) -> Image.Image:
    """Draws a canvas: keyframes side by side, every token a rectangle, near tokens in near colours.

    Args:
        canvas: f32 `[t, h, w, D]`.
        size: (height, width) in pixels of each keyframe, such as the picture's; 512 on the longer side by default.

    Raises:
        EngineError: the canvas is not finite.
    """
    if not np.isfinite(canvas).all():
        raise EngineError("the planner gave a canvas that is not finite; build the bundle again with a higher precision")
    colours = np.rint(principal_colours(canvas) * 255).astype(np.uint8)
    _, rows, columns, _ = colours.shape
    scale = SIDE / max(rows, columns)
    height, width = size or (max(1, round(rows * scale)), max(1, round(columns * scale)))
    sheet = Image.new("RGB", (len(colours) * (width + GAP) - GAP, height), (255, 255, 255))
    for index, frame in enumerate(colours):
        tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (index * (width + GAP), 0))
    return sheet


def principal_colours(canvas: NDArray[np.float32]) -> NDArray[np.float64]:
    """`[t, h, w, 3]` in [0, 1]: each component stretched between two percentiles; 0.5 where a component does not vary.

    The same canvas gives the same colours: of the two signs of a component, the one whose largest weight is positive.
    """
    features = canvas.reshape(-1, canvas.shape[-1]).astype(np.float64)
    features -= features.mean(axis=0)
    largest = np.abs(features).max(initial=0.0)
    colours = np.full((len(features), 3), 0.5)
    if largest > 0:
        _, spread, axes = np.linalg.svd(features / largest, full_matrices=False)
        for component in range(min(3, len(spread))):
            if spread[component] <= FLAT * spread[0]:
                break
            axis = axes[component]
            values = features @ (axis * np.sign(axis[np.abs(axis).argmax()]))
            low, high = np.percentile(values, PERCENTILES)
            if high > low:
                colours[:, component] = np.clip((values - low) / (high - low), 0, 1)
    return colours.reshape(*canvas.shape[:-1], 3)
