"""What passes between a transformer's blocks, as tensors that an engine can take and give.

Engines name their sizes, and tokens are fewer than cells where a token is several of them. So hidden states `[N, tokens, D]`
travel as `[N, (T,) H, W, D / cells of a token]`: the same numbers in the same order, sized like the latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

HIDDEN = "hidden"
"""The noisy target's hidden states: the part of a stream that the model's output is made of."""

Sizes = Mapping[str, Any]
"""The sizes of the step's dynamic dimensions in a pass; symbols while it is traced."""


class BlockStream(ABC):
    """The blocks of one kind of backbone and what they hand on.

    Attributes:
        lists: the model's lists of blocks, in the order of a pass.
    """

    lists: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shapes(self, width: int, cells: int, config: Any) -> dict[str, tuple[int | str, ...]]:
        """The tensors by name, `hidden` first, each with its shape behind batch and branches.

        Args:
            width: of the hidden states.
            cells: latent cells of a token.
            config: the model's configuration.
        """

    @abstractmethod
    def tensors(self, output: Any, sizes: Sizes, config: Any) -> dict[str, Tensor]:
        """What a block returned, as those tensors, `[N, *shape]`."""

    @abstractmethod
    def output(self, tensors: Mapping[str, Tensor], width: int, config: Any) -> Any:
        """Those tensors as a block returns them."""


class PictureStream(BlockStream):
    """Tokens of one picture alone, `[N, tokens, D]`: SANA."""

    lists = ("transformer_blocks",)

    def shapes(self, width: int, cells: int, config: Any) -> dict[str, tuple[int | str, ...]]:
        return {HIDDEN: ("H", "W", width // cells)}

    def tensors(self, output: Any, sizes: Sizes, config: Any) -> dict[str, Tensor]:
        return {HIDDEN: folded(output, sizes["H"], sizes["W"])}

    def output(self, tensors: Mapping[str, Tensor], width: int, config: Any) -> Any:
        return unfolded(tensors[HIDDEN], width)


def folded(tokens: Tensor, *sizes: Any) -> Tensor:
    """Hidden states `[N, ..., D]` as `[N, *sizes, D / cells of a token]`."""
    return tokens.reshape(tokens.shape[0], *sizes, -1)


def unfolded(cells: Tensor, width: int) -> Tensor:
    """The hidden states `[N, tokens, width]` that :func:`folded` was given."""
    return cells.reshape(cells.shape[0], -1, width)
