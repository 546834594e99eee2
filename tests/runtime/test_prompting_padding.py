"""Padded rows that a backbone reads: all of them, or one that stands for all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.prompting import Prompter, normalized

WORDS = Prompting(
    tokenizer="words.json", segments=(Segment(slot="prompt"),), max_tokens=6, truncate=True, pad_id=0, padding_counts=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    tokenizer = Tokenizer(models.WordLevel({"pad": 0, "unk": 1, "a": 2, "b": 3}, unk_token="unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder


@pytest.mark.parametrize(
    ("prompts", "ids", "counts"),
    [
        (["a b"], [[2, 3, 0]], [[1, 1, 4]]),
        ([""], [[0]], [[6]]),
        (["a", "a b b"], [[2, 0, 0, 0], [2, 3, 3, 0]], [[1, 3, 1, 1], [1, 1, 1, 3]]),
        (["a b a b a b a b"], [[2, 3, 2, 3, 2, 3]], [[1] * 6]),
        (["a a a a a"], [[2, 2, 2, 2, 2, 0]], [[1] * 6]),
    ],
)
def test_one_padded_row_stands_for_all(folder: Path, prompts: list[str], ids: list, counts: list) -> None:
    encoded = Prompter(WORDS, folder).encode(prompts)
    assert encoded.input_ids.tolist() == ids
    assert encoded.context_mask.tolist() == counts
    assert encoded.attention_mask.sum(axis=1).tolist() == encoded.lengths.tolist()


def test_padding_to_the_limit_counts_row_by_row(folder: Path) -> None:
    encoded = Prompter(replace(WORDS, pad_to_max=True), folder).encode(["a", ""])
    assert encoded.input_ids.shape == (2, 6)
    np.testing.assert_array_equal(encoded.context_mask, np.ones((2, 6), np.int64))


def test_padding_that_does_not_count_is_masked(folder: Path) -> None:
    encoded = Prompter(replace(WORDS, padding_counts=False), folder).encode(["a", "a b b"])
    assert encoded.context_mask.tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [("  two\n\tspaces ", "two spaces"), ("a &amp;lt; b", "a < b"), ("\u3000", ""), ("CAPS stay", "CAPS stay")],
)
def test_clean_resolves_entities_and_white_space(prompt: str, clean: str) -> None:
    assert normalized(prompt, "clean") == clean
