"""Convolutions over three dimensions in what torch's compiler makes for a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_VOLUMES = 5  # dimensions of [B, C, T, H, W]


@contextmanager
def contiguous_volumes() -> Iterator[None]:
    """Compiles every 3-D convolution for the CPU with contiguous inputs and a contiguous result.

    At each call torch chooses the library that computes it, by batch, sizes and number of threads: oneDNN, or for small float32
    inputs its own loop. Of a channels-last input oneDNN makes a channels-last result and the loop a contiguous one. Compiled
    code takes the strides that the choice gives at the exported sizes for those of every size: a batch of one, or one thread
    instead of two, and it reads the result scrambled. Of contiguous inputs both make contiguous results.

    Convolutions over two dimensions stay as they are: there each library keeps its input's layout.
    """
    from torch._inductor import ir
    from torch._inductor.kernel import conv

    expected = conv.conv_layout

    def layout(x: Any, *others: Any, **options: Any) -> Any:
        found = expected(x, *others, **options)
        if found.device.type == "cpu" and len(found.size) == _VOLUMES:
            return ir.FixedLayout(found.device, found.dtype, found.size)  # contiguous; the compiler lays the inputs out like it
        return found

    conv.conv_layout = layout
    try:
        yield
    finally:
        conv.conv_layout = expected
