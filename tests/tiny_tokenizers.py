"""Tokenizers of the real kinds, trained on a few lines, for the tests of prompting."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    T5Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

CORPUS = ["a red circle left of a blue square", "two green triangles above a yellow square", "user assistant system"] * 4
QWEN_SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's chat template."""


class TextProcessor(Qwen2_5_VLProcessor):
    """The real processor; only its demand for a video processor is lifted, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-level Qwen2 tokenizer whose end of text is `<|im_end|>`, as in Qwen2.5-VL."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    vocabulary = learner.get_vocab()
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(QWEN_SPECIALS)}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=_merges(learner),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(QWEN_SPECIALS[1:]),
    )


def qwen_processor() -> TextProcessor:
    """Qwen2.5-VL's processor around `qwen_tokenizer`."""
    return TextProcessor(
        image_processor=Qwen2VLImageProcessorPil(), tokenizer=qwen_tokenizer(), chat_template=QWEN_CHAT_TEMPLATE
    )


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer: spaces become "▁", unknown characters fall back to bytes, `<bos>` comes first."""
    learner = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_previous")
    specials: list[str | AddedToken] = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=360, special_tokens=specials, show_progress=False))
    return GemmaTokenizer(vocab=learner.get_vocab(), merges=_merges(learner), add_bos_token=True)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def clip_tokenizer(**options: Any) -> CLIPTokenizer:
    """A CLIP tokenizer: lower case, 77 tokens, the end of text as padding, words that end in `</w>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("ci", "r"), ("b", "l"), ("bl", "u"), ("blu", "e</w>")]
    pieces += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **options)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer: a Unigram model of letters and a few words, without sentinels and without a normaliser."""
    letters = [chr(code) for code in range(33, 127)]
    words = [f"▁{word}" for word in sorted({word for line in CORPUS for word in line.split()})]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scored += [(letter, -6.0) for letter in letters] + [(word, -4.0) for word in words]
    return T5Tokenizer(vocab=scored, extra_ids=0, model_max_length=512)
