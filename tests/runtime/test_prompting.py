"""Prompts through `tokenizers` alone against transformers' processor: the same ids and masks, and errors that say the mend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_export.model.config import CanvasConfig, MetaCanvasConfig, PromptConfig
from mc_export.prompting import planner_prompting
from mc_runtime.bundle.manifest import Prompting, Segment
from mc_runtime.errors import BundleError, CheckpointError, RequestError
from mc_runtime.prompting import MAX_CHARACTERS, Prompter, framed, normalized
from tests.tiny_tokenizers import QWEN_CHAT_TEMPLATE, qwen_processor

PROMPTS = [
    "",
    " ",
    "a red circle left of a blue square",
    "two\nlines\r\n\n and\ttabs  ",
    "naïve café, e\u0301 composed; ﬁ ligature; 猫と犬 🎨👩‍🎨",
    "<|im_end|>\n<|im_start|>assistant\nspecial tokens are special here too",
    "{{ messages }} {% raw %} <EoS> \\n",
    "word " * 60,
]


def config(max_tokens: int = 512, end_token: str | None = None) -> MetaCanvasConfig:
    canvas = CanvasConfig(grid=(1, 4, 4), pixels_per_token=8)
    return MetaCanvasConfig(canvas=canvas, prompt=PromptConfig(max_tokens=max_tokens, end_token=end_token))


@pytest.fixture(scope="module")
def processor() -> Any:
    return qwen_processor()


def test_a_limit_that_the_frame_alone_exceeds(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"prompt\.max_tokens is 1, and the frame around a prompt takes \d+; raise it"):
        planner_prompting(processor, config(max_tokens=1), tmp_path)


@pytest.fixture(scope="module")
def prompter(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("bundle")
    return Prompter(planner_prompting(processor, config(4096), folder), folder)


def of_processor(processor: Any, prompts: list[str]) -> Any:
    """What transformers makes of the chat-formatted prompts, each closed by the end token."""
    chats = [[{"role": "user", "content": [{"type": "text", "text": prompt}]}] for prompt in prompts]
    texts = [processor.apply_chat_template(chat, tokenize=False) + "<|im_end|>" for chat in chats]
    return processor(text=texts, padding=True, padding_side="right", return_tensors="np")


def test_ids_and_masks_equal_the_processors(processor: Any, prompter: Prompter) -> None:
    expected, got = of_processor(processor, PROMPTS), prompter.encode(PROMPTS)
    np.testing.assert_array_equal(got.input_ids, np.where(expected.attention_mask == 1, expected.input_ids, got.input_ids))
    np.testing.assert_array_equal(got.attention_mask, expected.attention_mask)
    np.testing.assert_array_equal(got.lengths, expected.attention_mask.sum(axis=1))
    assert got.input_ids.dtype == got.attention_mask.dtype == np.int64
    assert (got.input_ids[got.attention_mask == 0] == prompter.spec.pad_id).all()
    assert prompter.spec.pad_id == processor.tokenizer.pad_token_id


@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompts=st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_ids_equal_the_processors_for_any_text(processor: Any, prompter: Prompter, prompts: list[str]) -> None:
    expected, got = of_processor(processor, prompts), prompter.encode(prompts)
    np.testing.assert_array_equal(got.attention_mask, expected.attention_mask)
    assert (np.where(got.attention_mask == 1, got.input_ids - expected.input_ids, 0) == 0).all()


def test_every_prompt_ends_with_one_end_token_after_the_chat(processor: Any, prompter: Prompter) -> None:
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoded = prompter.encode(["a red circle", ""])
    for ids, length in zip(encoded.input_ids, encoded.lengths, strict=True):
        assert ids[length - 1] == end
        assert processor.tokenizer.decode(ids[: length - 1]).endswith("<|im_end|>\n")


def test_another_end_token_is_taken_from_the_config(processor: Any, tmp_path: Path) -> None:
    spec = planner_prompting(processor, config(end_token="<|endoftext|>"), tmp_path)
    encoded = Prompter(spec, tmp_path).encode(["x"])
    assert encoded.input_ids[0, -1] == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with pytest.raises(CheckpointError, match=r"<EoS>.*prompt\.end_token"):
        planner_prompting(processor, config(end_token="<EoS>"), tmp_path)


def test_saved_tokenizer_forgets_padding_and_truncation_of_earlier_calls(processor: Any, tmp_path: Path) -> None:
    processor.tokenizer("x", padding="max_length", max_length=7, truncation=True)
    encoded = Prompter(planner_prompting(processor, config(), tmp_path), tmp_path).encode(["a much longer prompt than that"])
    assert encoded.lengths[0] > 7


def test_batch_rows_do_not_depend_on_each_other(prompter: Prompter) -> None:
    together = prompter.encode(PROMPTS)
    for ids, length, prompt in zip(together.input_ids, together.lengths, PROMPTS, strict=True):
        np.testing.assert_array_equal(ids[:length], prompter.encode([prompt]).input_ids[0])


def test_all_rows_are_context(prompter: Prompter) -> None:
    encoded = prompter.encode(["a", "a longer one"])
    np.testing.assert_array_equal(encoded.select, np.arange(encoded.input_ids.shape[1]))
    np.testing.assert_array_equal(encoded.context_mask, encoded.attention_mask)


def test_a_prompt_over_the_limit_is_refused_with_both_numbers(processor: Any, tmp_path: Path) -> None:
    free = Prompter(planner_prompting(processor, config(), tmp_path), tmp_path)
    length = int(free.encode(["word " * 30]).lengths[0])
    fits = Prompter(replace(free.spec, max_tokens=length), tmp_path)
    assert fits.encode(["word " * 30]).lengths[0] == length
    tight = Prompter(replace(free.spec, max_tokens=length - 3), tmp_path)
    with pytest.raises(RequestError, match=rf"{length} tokens.* {length - 3};.* by 3$"):
        tight.encode(["short", "word " * 30])


def test_truncation_keeps_the_end_token(processor: Any, tmp_path: Path) -> None:
    spec = replace(planner_prompting(processor, config(), tmp_path), max_tokens=40, truncate=True)
    encoded = Prompter(spec, tmp_path).encode(["word " * 100])
    assert encoded.lengths[0] == 40
    assert encoded.input_ids[0, -1] == spec.end_token_id


def test_a_book_is_refused_before_it_is_tokenized(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompter, "_tokenizer", None)
    with pytest.raises(RequestError, match=f"100000 characters.* {MAX_CHARACTERS}"):
        prompter.encode(["x" * 100_000])


@pytest.mark.parametrize(("prompts", "reason"), [([], "no prompt"), ([None], "NoneType"), (["\ud800"], "valid Unicode")])
def test_what_is_no_text_is_refused(prompter: Prompter, prompts: list[Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        prompter.encode(prompts)


def test_a_broken_tokenizer_file_is_a_bundle_error(prompter: Prompter, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"planner_tokenizer\.json.*build the bundle again"):
        Prompter(prompter.spec, tmp_path)
    (tmp_path / prompter.spec.tokenizer).write_text("{}", encoding="utf-8")
    with pytest.raises(BundleError):
        Prompter(prompter.spec, tmp_path)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content'][0]['text'] | trim }}{% endfor %}", "alters the prompt"),
        ("{% for m in messages %}{{ m['content'][0]['text'] * 2 }}{% endfor %}", "exactly once"),
        ("nothing of it", "exactly once"),
        (None, "no chat template"),
    ],
)
def test_templates_that_cannot_be_frozen_are_refused(template: str | None, reason: str, tmp_path: Path) -> None:
    processor = qwen_processor()
    processor.chat_template = template
    with pytest.raises(CheckpointError, match=reason):
        planner_prompting(processor, config(), tmp_path)


def test_a_slow_tokenizer_is_refused(processor: Any, tmp_path: Path) -> None:
    class Slow:
        eos_token = "</s>"
        chat_template = QWEN_CHAT_TEMPLATE

        def get_vocab(self) -> dict[str, int]:
            return {"</s>": 0}

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> str:
            return str(processor.apply_chat_template(messages, **kwargs))

    with pytest.raises(CheckpointError, match="Slow has no fast tokenizer"):
        planner_prompting(Slow(), config(), tmp_path)


def test_frame_and_normalisation() -> None:
    segments = (Segment(text="<"), Segment(slot="prompt"), Segment(text=">"))
    assert framed(segments, "{a} <b>") == "<{a} <b>>"
    assert normalized("  A Ünï\n", "lower_strip") == "a ünï"
    assert normalized("  A ", "none") == "  A "


def test_prompting_is_manifest_data(prompter: Prompter) -> None:
    assert isinstance(prompter.spec, Prompting)
    assert prompter.spec.segments[0].text == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert prompter.spec.segments[2].text == "<|im_end|>\n"
    assert not prompter.spec.truncate
