"""Device functions on one row of a `[..., D]` tensor, held in registers as two blocks (`mc_kernels.checks.split_width`)."""

from __future__ import annotations

from mc_kernels.language import tl, triton


@triton.jit
def wide(index):
    """An index in 64 bits, before it is multiplied by a stride.

    A launch from Python passes strides in the 64 bits that a kernel's signature asks for; a compiler that launches it by itself
    (AOTInductor) passes them in 32 where they fit, and then the product would overflow.
    """
    return index.to(tl.int64)


@triton.jit
def load_row(pointer, columns, mask):
    """A row's block in float32, zero where masked."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, columns, value, mask):
    """Rounds once, to the type the pointer has."""
    tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def norm_modulate(h_a, h_b, mask_a, mask_b, shift_a, shift_b, scale_a, scale_b, width, eps):
    """LayerNorm without weights over both blocks, then `* (1 + scale) + shift`; masked lanes of h must be zero."""
    mean = (tl.sum(h_a, axis=0) + tl.sum(h_b, axis=0)) / width
    centred_a = tl.where(mask_a, h_a - mean, 0.0)
    centred_b = tl.where(mask_b, h_b - mean, 0.0)
    variance = (tl.sum(centred_a * centred_a, axis=0) + tl.sum(centred_b * centred_b, axis=0)) / width
    inverse = 1.0 / tl.sqrt(variance + eps)
    return centred_a * inverse * (1.0 + scale_a) + shift_a, centred_b * inverse * (1.0 + scale_b) + shift_b
