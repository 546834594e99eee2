"""Prompts to token ids, equal to what transformers' processors make, by the `tokenizers` library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mc_runtime.bundle.manifest import Prompting
from mc_runtime.errors import BundleError, RequestError
from mc_runtime.prompting.positions import Grid, Positions, sequence_positions
from mc_runtime.prompting.template import framed, normalized
from mc_runtime.prompting.vision import Seen

MAX_CHARACTERS = 32_768
"""Longest prompt that is tokenized at all, so that a pasted book fails at once."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of B prompts, right padded to L, the longest of them (or the limit, where an engine's length is fixed).

    Attributes:
        input_ids: i64 `[B, L]`.
        attention_mask: i64 `[B, L]`, 1 at real tokens.
        lengths: i64 `[B]`, real tokens of each prompt.
        select: i64 `[S]`, the rows whose hidden states become the context, ascending and below L.
        position_ids: i64 `[3, B, L]`, multimodal RoPE positions; 0 at padding.
        starts: i64 `[B]`, the next free position, where a canvas begins.
        vision_index: i64 `[B, L]`, the row of the vision embeddings that stands at a token; -1 at text and padding.
        padded_to: rows that the backbone reads of every prompt, padding included; 0 where padding does not count.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    lengths: NDArray[np.int64]
    select: NDArray[np.int64]
    position_ids: Positions
    starts: NDArray[np.int64]
    vision_index: NDArray[np.int64]
    padded_to: int = 0

    @property
    def context_mask(self) -> NDArray[np.int64]:
        """i64 `[B, S]`: how often a row of the context counts; the first padded row stands for those that are not there."""
        if not self.padded_to:
            return self.attention_mask[:, self.select]
        counts = np.ones_like(self.attention_mask)
        padded = self.lengths < counts.shape[1]
        counts[padded, self.lengths[padded]] += self.padded_to - counts.shape[1]
        return counts[:, self.select]


class _Sequence(NamedTuple):
    """One prompt: token ids, positions `[3, n]`, the next free position, and the vision row of each token or -1."""

    ids: list[int]
    positions: Positions
    start: int
    vision_index: NDArray[np.int64]


class Prompter:
    """Encodes the prompts of one engine. It keeps no state between calls, so threads may share it.

    Args:
        spec: how, from the manifest.
        folder: the bundle, which holds the tokenizer.

    Raises:
        BundleError: the tokenizer cannot be read.
    """

    def __init__(self, spec: Prompting, folder: Path) -> None:
        self.spec = spec
        path = folder / spec.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path}: not a tokenizer ({error}); build the bundle again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, prompts: Sequence[str], negative: bool = False, seen: Sequence[Seen] = ()) -> Encoded:
        """Token ids of `prompts`; `negative` takes the frame and the limit of negative prompts.

        Every prompt comes with the same pictures and clips, `seen`, in front of its text.

        Rows that `select` would take from padding beyond the longest prompt are dropped: attention is causal and padding is on
        the right, so no real row changes, and such rows are masked in the context anyway.

        Raises:
            RequestError: a prompt is no text, too long, or there is none; or it sees and this engine reads text only.
        """
        if not prompts:
            raise RequestError("there is no prompt; give at least one (it may be empty)")
        if seen and self.spec.vision is None:
            raise RequestError("this bundle reads text only; give no pictures, or build one of a checkpoint with such a task")
        limit = self._limit(negative)
        texts = [self._ids(prompt, limit, negative, seen) for prompt in prompts]
        limit += sum(one.grid.tokens for one in seen)
        sequences = [self._sequence(ids, seen) for ids in texts]
        lengths = np.array([len(one.ids) for one in sequences], dtype=np.int64)
        spare = int(self.spec.padding_counts)  # one padded row at least
        width = limit if self.spec.pad_to_max else min(limit, int(lengths.max()) + spare)
        input_ids = np.full((len(sequences), width), self.spec.pad_id, dtype=np.int64)
        positions = np.zeros((3, len(sequences), width), dtype=np.int64)
        vision_index = np.full((len(sequences), width), -1, dtype=np.int64)
        for row, one in enumerate(sequences):
            input_ids[row, : len(one.ids)] = one.ids
            positions[:, row, : len(one.ids)] = one.positions
            vision_index[row, : len(one.ids)] = one.vision_index
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        starts = np.array([one.start for one in sequences], dtype=np.int64)
        select = self._selected(width, limit, negative)
        padded_to = limit if self.spec.padding_counts else 0
        return Encoded(input_ids, mask, lengths, select, positions, starts, vision_index, padded_to)

    def _limit(self, negative: bool) -> int:
        if negative and self.spec.negative_max_tokens is not None:
            return self.spec.negative_max_tokens
        return self.spec.max_tokens

    def _sequence(self, ids: list[int], seen: Sequence[Seen]) -> _Sequence:
        """`ids` with the one token of every picture and clip repeated for each of its own.

        Raises:
            RequestError: the prompt itself has such tokens.
        """
        vision = self.spec.vision
        wanted: list[int] = []
        places: list[int] = []
        if vision is not None and seen:
            wanted = [vision.clip_token_id if one.is_clip else vision.image_token_id for one in seen]
            places = [row for row, token in enumerate(ids) if token in (vision.image_token_id, vision.clip_token_id)]
        if [ids[row] for row in places] != wanted:
            raise RequestError("the prompt contains a token that stands for a picture or a clip; take it out of the text")
        parts: list[int | Grid] = []
        pieces, index, before, row = [], [], 0, 0
        for place, one in zip(places, seen, strict=True):
            tokens = one.grid.tokens
            parts += [place - before, one.grid]
            pieces += [ids[before:place], ids[place : place + 1] * tokens]
            index += [np.full(place - before, -1), np.arange(row, row + tokens)]
            before, row = place + 1, row + tokens
        parts.append(len(ids) - before)
        positions, start = sequence_positions(parts)
        expanded = [token for piece in (*pieces, ids[before:]) for token in piece]
        rows = np.concatenate([*index, np.full(len(ids) - before, -1)])
        return _Sequence(expanded, positions, start, rows)

    def _ids(self, prompt: str, limit: int, negative: bool, seen: Sequence[Seen]) -> list[int]:
        if not isinstance(prompt, str):
            raise RequestError(f"a prompt must be text, got {type(prompt).__name__}")
        if len(prompt) > MAX_CHARACTERS:
            raise RequestError(f"the prompt has {len(prompt)} characters, the limit is {MAX_CHARACTERS}; shorten it")
        spec = self.spec
        segments = spec.negative_segments if negative and spec.negative_segments is not None else spec.segments
        try:
            text = framed(segments, normalized(prompt, spec.normalize), self._media_text(seen))
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:  # lone surrogates, as from a badly decoded argument
            raise RequestError("the prompt is not valid Unicode text; check its encoding") from error
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{spec.tokenizer}: cannot read this prompt ({error}); build the bundle again") from error
        added = self._tokenizer.num_special_tokens_to_add(False) + (spec.end_token_id is not None)
        length = len(encoding) + added
        if length > limit:
            if not spec.truncate:
                raise RequestError(
                    f"the prompt takes {length} tokens with its frame, the limit is {limit}; shorten it by {length - limit}"
                )
            encoding.truncate(max(0, limit - added))
        ids: list[int] = self._tokenizer.post_process(encoding).ids
        return ids if spec.end_token_id is None else [*ids, spec.end_token_id]

    def _media_text(self, seen: Sequence[Seen]) -> str:
        vision = self.spec.vision
        return "".join(vision.clip_text if one.is_clip else vision.image_text for one in seen) if vision else ""

    def _selected(self, width: int, limit: int, negative: bool) -> NDArray[np.int64]:
        """The rows of the manifest's `select` that exist; all rows where it names none, and for the negative prompt."""
        if negative or self.spec.select is None:
            return np.arange(width, dtype=np.int64)
        rows = np.array(self.spec.select, dtype=np.int64)
        rows = np.where(rows < 0, rows + limit, rows)
        return rows[rows < width]
