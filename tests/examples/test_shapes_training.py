"""The demo's training loop resumes exactly, and its vocabulary and labels say what they must."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.shapes import data
from examples.shapes.fit import Fit, fit
from examples.shapes.models import GRID
from examples.shapes.processor import SPECIALS, VOCABULARY, train_tokenizer
from examples.shapes.train_planner import CLASSES, FINENESS, labels, tokenize


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]  # the class is transformers', which mypy does not follow
    return train_tokenizer("user\n" + scene.caption for scene in data.all_scenes())


def fitted(work: Path, stops: list[int]) -> Tensor:
    """A toy problem, interrupted after each of `stops` steps."""
    work.mkdir()
    for stop in stops:
        torch.manual_seed(0)
        module = nn.Linear(4, 1)
        plan = Fit("toy", steps=8, lr=0.1, warmup=2, decay=0.5, save_every=4)

        def loss_at(step: int, module: nn.Module = module, stop: int = stop) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return module(torch.randn(16, 4)).square().mean()

        with suppress(KeyboardInterrupt):
            fit(plan, module, loss_at, work, seed=3)
    return module.weight.detach()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    straight = fitted(tmp_path / "straight", [8])
    resumed = fitted(tmp_path / "resumed", [6, 8])
    torch.testing.assert_close(resumed, straight, rtol=0, atol=0)


def test_averaged_weights_keep_no_history(tmp_path: Path) -> None:
    fitted(tmp_path / "run", [8])
    saved = torch.load(tmp_path / "run" / "toy.pt", weights_only=True)
    assert not any(weight.requires_grad for weight in saved["average"])


def test_every_word_of_the_grammar_is_one_token(tokenizer) -> None:  # type: ignore[no-untyped-def]
    for scene in data.sample(list(data.all_scenes()), 200, random.Random(0)):
        assert len(tokenizer(scene.caption)["input_ids"]) <= len(scene.caption.split()) + 1


@pytest.mark.parametrize("text", ["", "a red circle", "Zwölf Бананы 香蕉 🍌", "tab\tand\nnewline"])
def test_any_text_survives_the_vocabulary(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_ids_at_the_end(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer.convert_tokens_to_ids(list(SPECIALS))
    assert ids == list(range(len(tokenizer) - len(SPECIALS), len(tokenizer)))
    assert len(tokenizer) <= VOCABULARY


def test_the_canvas_follows_the_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    prompts = tokenize(tokenizer, ["", "a red circle left of a blue square"])
    assert torch.equal(prompts.canvas_positions[:, :, 0, 0, 0], prompts.mask.sum(1).expand(3, -1))
    assert prompts.rows(torch.tensor([1])).canvas_positions.shape == (3, 1, 1, GRID, GRID)


def test_labels_mark_the_shapes_of_the_layout() -> None:
    parts = labels(data.parse("a red circle left of a blue square")).reshape(GRID, GRID, FINENESS**2)
    assert parts.shape == (GRID, GRID, FINENESS**2)
    assert parts.max() < CLASSES
    left, right = set(parts[:, : GRID // 2].ravel()) - {0}, set(parts[:, GRID // 2 :].ravel()) - {0}
    assert len(left) == len(right) == 1
    assert left != right
