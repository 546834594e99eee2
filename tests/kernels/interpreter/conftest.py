"""Triton 3.6.0's interpreter, mended where it is wrong, and `torch.empty` that cannot pass for zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from mc_kernels.launch import interpreting

if not interpreting():
    raise pytest.UsageError(
        "these tests need Triton's interpreter: set TRITON_INTERPRET=1, or run tests/kernels/test_interpreter.py"
    )

TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: object) -> np.ndarray:
    """Bits of one float type to bits of another, rounded to nearest even as the hardware does.

    3.6.0 truncates float32 to bfloat16 and loses the carry of a mantissa that rounds up in float8.
    """
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{source.primitive_bitwidth // 8}"))
    converted = bits.view(TORCH_DTYPES[source]).to(TORCH_DTYPES[target]).view(BITS[target.primitive_bitwidth])
    return converted.numpy().view(f"u{target.primitive_bitwidth // 8}").reshape(data.shape)


def index_of(tensor: tl.tensor) -> int:
    """A scalar tensor as a bound of `range`: 3.6.0 calls `int` on an array of shape [1], which numpy 2.4 refuses."""
    return int(tensor.handle.data.item())


@pytest.fixture(autouse=True, scope="session")
def mended_interpreter() -> Iterator[None]:
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", index_of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert_float)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)
        yield


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: whatever a kernel forgets to write shows."""

    def poisoned(create: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def created(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = create(*args, **kwargs)
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).fill_(0x7F)
            elif tensor.is_floating_point():
                tensor.fill_(float("nan"))
            return tensor

        return created

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
