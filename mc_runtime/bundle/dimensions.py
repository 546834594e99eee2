"""Dimensions of tensors as the manifest writes them: a size, a name, or a multiple of a name such as `8*H`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def factor_and_name(dimension: str) -> tuple[int, str]:
    """`8*H` as (8, "H"), `H` as (1, "H")."""
    factor, _, name = dimension.rpartition("*")
    return int(factor or 1), name


def names_in(shape: Iterable[int | str]) -> set[str]:
    """The names that a shape's dimensions have."""
    return {factor_and_name(dimension)[1] for dimension in shape if isinstance(dimension, str)}


def sizes_of(shape: Iterable[int | str], extents: Mapping[str, int]) -> tuple[int, ...]:
    """The shape with the sizes of its names put in.

    Raises:
        KeyError: a name has no size.
    """

    def size(dimension: int | str) -> int:
        if isinstance(dimension, int):
            return dimension
        factor, name = factor_and_name(dimension)
        return factor * extents[name]

    return tuple(size(dimension) for dimension in shape)


def extents_in(shape: Sequence[int | str], sizes: Sequence[int]) -> dict[str, int]:
    """The sizes of a shape's names in a tensor of these sizes.

    Raises:
        ValueError: the tensor does not fit the shape.
    """
    found: dict[str, int] = {}
    if len(shape) == len(sizes):
        for dimension, size in zip(shape, sizes, strict=True):
            if isinstance(dimension, str):
                factor, name = factor_and_name(dimension)
                found.setdefault(name, size // factor)
        if sizes_of(shape, found) == tuple(sizes):
            return found
    raise ValueError(f"{list(sizes)} does not fit {list(shape)}")
