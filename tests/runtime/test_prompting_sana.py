"""Stock SANA's prompts against diffusers' `SanaPipeline.encode_prompt`: ids, masks and selected rows."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from transformers import Gemma2Config, Gemma2Model

from mc_export.backbones.sana import Sana
from mc_export.prompting import text_prompting
from mc_runtime.prompting import Encoded, Prompter
from tests.tiny_tokenizers import gemma_tokenizer

PROMPTS = [
    "a red circle",
    "  A Photo of a CAT, 猫  \n",
    "",
    "two green triangles above a yellow square " * 40,
    "<eos> and <bos>",
    "İstanbul 🎨",
]
NEGATIVES = ["", "BLURRY ", "", "low quality " * 80, "x", "🎨"]


class EchoEncoder(torch.nn.Module):
    """A text encoder whose hidden states are the token ids, so that selected rows can be read back."""

    dtype = torch.float32

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (input_ids[..., None].float(),)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return gemma_tokenizer()


@pytest.fixture(scope="module")
def prompter(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    folder = tmp_path_factory.mktemp("bundle")
    return Prompter(*text_prompting(Sana(), [tokenizer], folder), folder)


@pytest.fixture(scope="module")
def folder(prompter: Prompter, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    text_prompting(Sana(), [tokenizer], folder)
    return folder


@pytest.fixture(scope="module")
def of_pipeline(tokenizer: Any) -> tuple[np.ndarray, ...]:
    """Ids and masks of the context rows, positive then negative, each `[B, 300]`."""
    pipeline = SanaPipeline(tokenizer, EchoEncoder(), vae=None, transformer=None, scheduler=None)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    encoded = pipeline.encode_prompt(
        PROMPTS, True, negative_prompt=NEGATIVES, device="cpu", complex_human_instruction=instruction
    )
    ids, mask, negative_ids, negative_mask = (tensor.numpy() for tensor in encoded)
    return ids[..., 0], mask, negative_ids[..., 0], negative_mask


def check(encoded: Encoded, ids: np.ndarray, mask: np.ndarray) -> None:
    kept = len(encoded.select)
    np.testing.assert_array_equal(encoded.context_mask, mask[:, :kept])
    np.testing.assert_array_equal(encoded.input_ids[:, encoded.select], ids[:, :kept])
    assert not mask[:, kept:].any(), "a real row was dropped"


def test_positive_prompts_select_the_pipelines_rows(prompter: Prompter, of_pipeline: tuple[np.ndarray, ...]) -> None:
    encoded = prompter.encode(PROMPTS)
    check(encoded, *of_pipeline[:2])
    assert encoded.lengths.max() == prompter.spec.max_tokens, "the long prompt is truncated"
    for i, prompt in enumerate(PROMPTS):
        check(prompter.encode([prompt]), of_pipeline[0][i : i + 1], of_pipeline[1][i : i + 1])


def test_negative_prompts_have_no_instruction(prompter: Prompter, of_pipeline: tuple[np.ndarray, ...]) -> None:
    encoded = prompter.encode(NEGATIVES, negative=True)
    check(encoded, *of_pipeline[2:])
    assert encoded.lengths.max() == 300
    for i, prompt in enumerate(NEGATIVES):
        check(prompter.encode([prompt], negative=True), of_pipeline[2][i : i + 1], of_pipeline[3][i : i + 1])


def test_padding_to_the_limit_gives_every_row(prompter: Prompter, folder: Path, of_pipeline: tuple[np.ndarray, ...]) -> None:
    padded = Prompter(replace(prompter.spec, pad_to_max=True), folder)
    for encoded, ids, mask in (
        (padded.encode(PROMPTS), *of_pipeline[:2]),
        (padded.encode(NEGATIVES, negative=True), *of_pipeline[2:]),
    ):
        assert len(encoded.select) == 300
        check(encoded, ids, mask)


def test_rows_may_be_counted_from_the_end(prompter: Prompter, folder: Path) -> None:
    from_end = Prompter(replace(prompter.spec, select=(0, *range(-299, 0))), folder)
    np.testing.assert_array_equal(from_end.encode(PROMPTS).select, prompter.encode(PROMPTS).select)


def test_dropping_padding_does_not_change_real_rows(prompter: Prompter, folder: Path) -> None:
    torch.manual_seed(0)
    gemma = Gemma2Model(
        Gemma2Config(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=64,
            query_pre_attn_scalar=16,
        )
    ).eval()
    prompts = [PROMPTS[0], PROMPTS[1]]
    short = prompter.encode(prompts)
    full = Prompter(replace(prompter.spec, pad_to_max=True), folder).encode(prompts)
    assert short.input_ids.shape[1] < full.input_ids.shape[1]
    states = []
    for encoded in (short, full):
        with torch.no_grad():
            hidden = gemma(torch.from_numpy(encoded.input_ids), torch.from_numpy(encoded.attention_mask))[0]
        states.append(hidden.numpy()[:, encoded.select] * encoded.context_mask[..., None])
    np.testing.assert_allclose(states[0], states[1][:, : len(short.select)], atol=2e-6)
