"""The planner's single pass, against transformers' own model, positions and KV cache, and PEFT's own adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLModel

from mc_export.checkpoint import load_checkpoint
from mc_export.model.config import CanvasConfig
from mc_export.model.planner import CanvasTokens, Planner
from mc_export.reference.prompts import canvas_positions, encode_for_planner
from mc_runtime.errors import CheckpointError
from tests.factories import PLANNER_DIM, save_random_lora, tiny_metacanvas_checkpoint, tiny_planner

PROMPTS = ["a red circle left of a blue square", "a cat", "two green triangles above a yellow square, émile 日本"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("planner") / "checkpoint", seed=3, lora=True)


def encoded(path: Path, prompts: list[str], grid: tuple[int, int, int]) -> dict[str, Tensor]:
    opened = load_checkpoint(path)
    assert opened.config is not None
    return encode_for_planner(opened.load_planner_tokenizer(), opened.config, prompts, grid)


def load_planner(path: Path) -> Planner:
    opened = load_checkpoint(path)
    return opened.load_planner(opened.load_canvas())


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 3, 5), (3, 2, 4)])
@torch.no_grad()
def test_one_pass_with_lora_on_canvas_rows_equals_two_phases_with_a_kv_cache(
    checkpoint: Path, grid: tuple[int, int, int]
) -> None:
    """Section 3.1: the adapter is off up to <EoS>, then on for the canvas; PEFT switches it, the cache carries the context."""
    planner = load_planner(checkpoint)
    peft = PeftModel.from_pretrained(tiny_planner(3), str(checkpoint / "planner_lora")).eval()
    language_model = peft.base_model.model.model.language_model
    for prompt in PROMPTS:
        feeds = encoded(checkpoint, [prompt], grid)
        states = planner(**feeds)
        cache = DynamicCache(config=language_model.config)
        with peft.disable_adapter():
            context = language_model(
                input_ids=feeds["input_ids"], position_ids=feeds["position_ids"], past_key_values=cache, use_cache=True
            ).last_hidden_state
        length, rows = feeds["input_ids"].shape[1], grid[0] * grid[1] * grid[2]
        causal = torch.ones(rows, length + rows, dtype=torch.bool).tril(length)[None, None]
        canvas = language_model(
            inputs_embeds=planner.canvas_tokens(grid).flatten(0, 2)[None],
            position_ids=feeds["canvas_position_ids"].flatten(2),
            attention_mask={"full_attention": causal},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        torch.testing.assert_close(states.context, context, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states.canvas.flatten(1, 3), canvas, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_adapter_changes_the_canvas_and_nothing_else(checkpoint: Path) -> None:
    opened = load_checkpoint(checkpoint)
    feeds = encoded(checkpoint, PROMPTS, (1, 4, 4))
    with_lora = load_planner(checkpoint)(**feeds)
    without = Planner(tiny_planner(3).model, opened.load_canvas().canvas_tokens)(**feeds)
    real = feeds["attention_mask"].bool()
    assert torch.equal(with_lora.context[real], without.context[real])
    assert (with_lora.canvas - without.canvas).abs().max() > 0.1


@torch.no_grad()
def test_a_padded_batch_gives_each_prompt_what_it_gets_alone(checkpoint: Path) -> None:
    planner = load_planner(checkpoint)
    batch = planner(**encoded(checkpoint, PROMPTS, (1, 3, 5)))
    for index, prompt in enumerate(PROMPTS):
        alone = planner(**encoded(checkpoint, [prompt], (1, 3, 5)))
        length = alone.context.shape[1]
        torch.testing.assert_close(batch.context[index, :length], alone.context[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(batch.canvas[index], alone.canvas[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_context_never_sees_the_canvas(checkpoint: Path) -> None:
    planner = load_planner(checkpoint)
    feeds = encoded(checkpoint, PROMPTS[:1], (1, 4, 4))
    before = planner(**feeds)
    planner.canvas_tokens = CanvasTokens((1, 4, 4), PLANNER_DIM)
    after = planner(**feeds)
    assert torch.equal(before.context, after.context)
    assert not torch.allclose(before.canvas, after.canvas, atol=1e-3)


@torch.no_grad()
def test_the_context_equals_transformers_own_forward(checkpoint: Path) -> None:
    feeds = encoded(checkpoint, PROMPTS[:1], (1, 4, 4))
    own = Qwen2_5_VLModel.from_pretrained(str(checkpoint / "planner")).eval()
    expected = own(input_ids=feeds["input_ids"], attention_mask=feeds["attention_mask"]).last_hidden_state
    torch.testing.assert_close(load_planner(checkpoint)(**feeds).context, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("start", "grid"), [(7, (1, 4, 4)), (31, (1, 3, 11)), (1, (1, 16, 16))])
def test_canvas_positions_are_those_of_an_image_of_that_grid(start: int, grid: tuple[int, int, int]) -> None:
    model = tiny_planner(0).model
    tokens = grid[1] * grid[2]
    ids = torch.cat([torch.arange(start) + 10, torch.full((tokens,), model.config.image_token_id)])[None]
    kinds = torch.cat([torch.zeros(start), torch.ones(tokens)])[None].int()
    merge = model.config.vision_config.spatial_merge_size
    thw = torch.tensor([[grid[0], grid[1] * merge, grid[2] * merge]])
    expected, _ = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=thw, attention_mask=torch.ones_like(ids))
    assert torch.equal(canvas_positions(start, grid).flatten(1), expected[:, 0, start:])
    assert torch.equal(torch.arange(start).expand(3, -1), expected[:, 0, :start])


def test_the_canvas_grid_follows_the_resolution() -> None:
    config = CanvasConfig(grid=(1, 16, 16), pixels_per_token=32)
    assert config.grid_at(512, 512) == (1, 16, 16)
    assert config.grid_at(384, 1000) == (1, 12, 32)
    assert CanvasConfig(grid=(3, 11, 20), pixels_per_token=64).grid_at(704, 1280) == (3, 11, 20)


def test_an_adapter_for_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from mc_export.model.lora import apply_planner_lora

    save_random_lora(tiny_planner(0), tmp_path, seed=1)
    narrow = tiny_planner(0).model
    narrow.language_model.layers[0].self_attn.q_proj = torch.nn.Linear(PLANNER_DIM, PLANNER_DIM // 2)
    with pytest.raises(CheckpointError, match="adapts 64x64"):
        apply_planner_lora(narrow, tmp_path)
