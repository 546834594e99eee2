"""Wan: the canvas in it, its engine form, what is refused, and a whole MetaCanvas checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_export.backbones.registry import backbone_of
from mc_export.backbones.text_t5 import distance_buckets
from mc_export.backbones.wan import Wan
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from mc_export.program.planner import PlannerProgram
from mc_export.program.step import StepProgram
from mc_export.quantize import calibration
from mc_export.reference import ReferencePipeline
from mc_export.reference.prompts import encode_for_planner
from tests.export.backbones.drive import Told, assert_same_latents, denoise, schedule_of
from tests.export.test_canvas_injection import plain_step_block
from tests.factories import PLANNER_DIM
from tests.tiny_wan import CHANNELS, TEXT_DIM, WIDTH, noise_of, tiny_metacanvas_wan, tiny_umt5, tiny_wan

# (batch, latent frames, latent height, latent width, context rows, canvas grid, references)
SHAPES = [(1, 3, 6, 8, 5, (3, 2, 2), 1), (2, 1, 4, 10, 1, (3, 4, 3), 2), (3, 4, 10, 6, 9, (1, 5, 3), 3)]
KINDS = pytest.mark.parametrize("clips", [False, True], ids=["frames", "clips"])
STEPS = 4


def inputs(shape: tuple, clips: bool, seed: int) -> dict[str, Tensor]:
    """What `CanvasBackbone` takes; every other sample has a first frame and, before its references, an empty slot."""
    batch, frames, height, width, rows, grid, references = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    counts = torch.ones(batch, rows, dtype=torch.int64)
    counts[:, -1] = torch.arange(batch) * 40 % 77 + 1
    if rows > 1:
        counts[-1, 0] = 0
    feeds = {
        "sample": draw(batch, CHANNELS, frames, height, width),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": draw(batch, rows, TEXT_DIM),
        "context_mask": counts,
        "canvas": draw(batch, *grid, WIDTH),
        "first_frame": draw(batch, CHANNELS, 1, height, width),
        "has_first_frame": (torch.arange(batch) % 2).float(),
    }
    if clips:
        mask = torch.ones(batch, references)
        mask[::2, 0] = 0
        feeds |= {
            "condition_latents": draw(batch, CHANNELS, frames, height, width),
            "condition_mask": (draw(batch, 1, frames, height, width) > 0).float(),
            "reference_frames": draw(batch, CHANNELS, references, height, width),
            "reference_mask": mask,
        }
    return feeds


def plain_prediction(model: nn.Module, connector: CanvasConnector | None, clips: bool, one: dict[str, Tensor]) -> Tensor:
    """One sample `[C, T, H, W]` without hooks, masks or flags: frames and context rows are left out or repeated instead."""
    frames, height, width = one["sample"].shape[1], *(extent // 2 for extent in one["sample"].shape[2:])
    clip, times = one["sample"], one["timestep"].repeat(frames)
    if one["has_first_frame"]:
        clip, times = torch.cat([one["first_frame"], clip[:, 1:]], dim=1), torch.cat([torch.zeros(1), times[1:]])
    hidden, before = clip, 0
    if clips:
        references = one["reference_frames"][:, one["reference_mask"] > 0]
        before = references.shape[1]
        ones = torch.ones(1, before, *clip.shape[2:])
        given = torch.cat([references, one["condition_latents"]], dim=1)
        mask = torch.cat([ones, one["condition_mask"]], dim=1)
        hidden = torch.cat([torch.cat([references, clip], dim=1), given, mask])
    tokens = F.conv3d(hidden[None], model.patch_embedding.weight, model.patch_embedding.bias, stride=(1, 2, 2))
    if connector is not None:
        canvas = F.interpolate(one["canvas"].permute(3, 0, 1, 2)[None], size=(frames, height, width), mode="trilinear")
        fused = (tokens[:, :, before:] + canvas)[0].permute(1, 2, 3, 0).flatten(1, 2)
        residual = plain_step_block(connector.step_block, fused, times, height, width)
        residual = residual.unflatten(1, (height, width)).permute(3, 0, 1, 2)[None]
        tokens = torch.cat([tokens[:, :, :before], tokens[:, :, before:] + residual], dim=2)
    tokens = tokens.flatten(2).transpose(1, 2)
    per_token = torch.cat([torch.zeros(before), times]).repeat_interleave(height * width)
    context = one["context"].repeat_interleave(one["context_mask"], dim=0)[None]
    embedded, modulation, context, _ = model.condition_embedder(per_token, context, timestep_seq_len=len(per_token))
    angles = model.rope(hidden[None])
    for block in model.blocks:
        tokens = block(tokens, context, modulation.unflatten(2, (6, -1)), angles)
    shift, scale = (model.scale_shift_table[:, None] + embedded[:, :, None]).unbind(2)
    tokens = model.proj_out(F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    cells = tokens[0].reshape(before + frames, height, width, 2, 2, CHANNELS)
    return cells.permute(5, 0, 1, 3, 2, 4).reshape(CHANNELS, before + frames, 2 * height, 2 * width)[:, before:]


@KINDS
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_model_bit_identical(shape: tuple, clips: bool) -> None:
    feeds = inputs(shape, clips, seed=5)
    feeds["context_mask"] = torch.ones_like(feeds["context_mask"])
    connector = CanvasConnector(PLANNER_DIM, WIDTH)
    with torch.no_grad():
        feeds["canvas"] = connector.draw(torch.randn(shape[0], *shape[5], PLANNER_DIM))
        injected = CanvasBackbone(Wan(), tiny_wan(3, clips), connector)(**feeds)
        without = CanvasBackbone(Wan(), tiny_wan(3, clips), None)(**(feeds | {"canvas": None}))
        assert torch.equal(injected, without)
        if not clips and shape[0] == 1:  # no flag is set: text-to-video, as `WanPipeline` calls the model
            per_token = feeds["timestep"][:, None].expand(-1, shape[1] * shape[2] * shape[3] // 4)
            published = tiny_wan(3)(feeds["sample"], per_token, feeds["context"], return_dict=False)[0]
            assert torch.equal(injected, published)


@KINDS
@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple, clips: bool) -> None:
    connector = CanvasConnector(PLANNER_DIM, WIDTH).eval()
    randomize_projections(connector, seed=13)
    feeds, model = inputs(shape, clips, seed=6), tiny_wan(4, clips)
    with torch.no_grad():
        expected = [plain_prediction(model, connector, clips, {k: v[i] for k, v in feeds.items()}) for i in range(shape[0])]
        without = plain_prediction(model, None, clips, {k: v[0] for k, v in feeds.items()})
        injected = CanvasBackbone(Wan(), tiny_wan(4, clips), connector)(**feeds)
        prepared = CanvasBackbone(Wan(), tiny_wan(4, clips), connector)
        context = Wan().context_preparation(prepared.model)(feeds["context"])
        Wan().prepare_for_export(prepared.model)
        engine_form = prepared(**(feeds | {"context": context}))
    torch.testing.assert_close(injected, torch.stack(expected), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(engine_form, torch.stack(expected), atol=2e-5, rtol=1e-4)
    assert (expected[0] - without).abs().max() > 0.05, "the canvas must reach the output"


def test_the_state_dict_keeps_the_published_keys() -> None:
    keys = set(tiny_wan(0).state_dict())
    assert set(CanvasBackbone(Wan(), tiny_wan(0), CanvasConnector(PLANNER_DIM, WIDTH)).model.state_dict()) == keys


def step_program(clips: bool, canvas: bool, order: int = 1) -> StepProgram:
    connector = CanvasConnector(PLANNER_DIM, WIDTH).eval() if canvas else None
    if connector is not None:
        randomize_projections(connector, seed=8)
    backbone = CanvasBackbone(Wan(), tiny_wan(9, clips, num_layers=1), connector)
    width = Wan().prepared_context_width(backbone.model.config)
    program = StepProgram(backbone, width, order=order, max_batch=4, max_tokens=16, max_canvas=8, keyframes=3)
    return program.eval()


def fed(program: StepProgram, frames: int, seed: int) -> dict[str, Tensor]:
    extents = {"B": 1 + frames % 2, "G": 2, "T": frames, "H": 10, "W": 6, "L": 4 + frames, "h": 3, "w": 5, "R": 1 + frames % 3}
    feed = program.example(extents, seed=seed)
    feed["context_mask"][:, :, -1] = 500
    return feed


def test_empty_reference_slots_are_inert() -> None:
    program = step_program(clips=True, canvas=True)
    feed = fed(program, 4, seed=1)
    references, mask = feed["reference_frames"][:, :, -1:], torch.ones(1, 1)
    few = program.run(feed | {"reference_frames": references, "reference_mask": mask})["next_sample"]
    slots = F.pad(references, (0, 0, 0, 0, 3, 0), value=7.0)
    many = program.run(feed | {"reference_frames": slots, "reference_mask": F.pad(mask, (3, 0))})["next_sample"]
    torch.testing.assert_close(many, few, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("count", "reach"), [(32, 128), (16, 64), (64, 256)])
def test_distance_buckets_are_the_encoders(count: int, reach: int) -> None:
    attention = tiny_umt5(1)[0].encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_num_buckets, attention.relative_attention_max_distance = count, reach
    assert distance_buckets(count, reach) == attention._relative_position_bucket(torch.arange(-reach, reach + 1)).tolist()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"in_channels": 6}, "in_channels is 6; it must be 4, or 9"),
        ({"image_dim": 32, "added_kv_proj_dim": 64}, "image encoder"),
        ({"patch_size": (2, 2, 2)}, "fold frames"),
    ],
)
def test_other_models_of_the_class_are_refused(overrides: dict[str, Any], reason: str) -> None:
    found = Wan().refusal(tiny_wan(0, **overrides).config)
    assert found is not None
    assert reason in found


def test_wan_is_found_by_its_class() -> None:
    assert isinstance(backbone_of("WanTransformer3DModel", "WanPipeline"), Wan)
    assert Wan().refusal(tiny_wan(0).config) is None
    assert Wan().refusal(tiny_wan(0, clips=True).config) is None


@pytest.fixture(scope="module")
def metacanvas(tmp_path_factory: pytest.TempPathFactory) -> ReferencePipeline:
    return ReferencePipeline.from_checkpoint(tiny_metacanvas_wan(tmp_path_factory.mktemp("metacanvas") / "checkpoint", seed=5))


@torch.inference_mode()
def test_planner_and_step_programs_equal_the_reference(metacanvas: ReferencePipeline) -> None:
    """In-context video: the planner's engine form, then the step's, against transformers, diffusers and the connector."""
    checkpoint, canvas = metacanvas.checkpoint, metacanvas.checkpoint.load_canvas()  # of its own: programs change it
    assert checkpoint.config is not None
    noise, prompts = noise_of(2, 5, (64, 96)), ["a red circle", "two green triangles above a yellow square"]
    drawn = inputs((2, 2, 8, 12, 1, (3, 2, 3), 2), clips=True, seed=3)
    told = {condition.name: drawn[condition.name] for condition in Wan().conditions(checkpoint.model_config)}
    expected = metacanvas.generate(
        prompts, size=(64, 96), frames=5, steps=STEPS, guidance_scale=5.0, latents=noise.numpy(), output="latents",
        conditions={name: tensor.numpy() for name, tensor in told.items()},
    )  # fmt: skip
    model, width = checkpoint.load_model(), Wan().prepared_context_width(checkpoint.model_config)
    planner = PlannerProgram(
        checkpoint.load_planner(canvas), canvas, WIDTH, Wan().context_preparation(model), width, keyframes=3
    ).eval()
    branches, canvases = [], []
    for texts in (prompts, ["", ""]):
        encoded = encode_for_planner(metacanvas.planner_tokenizer, checkpoint.config, texts, (3, 2, 3))
        outputs = planner.run(encoded)
        branches.append(Told(outputs["context"], encoded["attention_mask"], None))
        canvases.append(outputs["canvas"])
    schedule = schedule_of(Wan(), model, checkpoint.load_scheduler(), STEPS)
    step = StepProgram(checkpoint.load_backbone(canvas), width, order=schedule.order, keyframes=3).eval()
    told["canvas"] = torch.stack(canvases, dim=1)
    latents = denoise(step, schedule, noise, branches, [5.0, -4.0], conditions=told)
    assert_same_latents(latents, torch.from_numpy(expected.latents))


def test_calibration_draws_videos(metacanvas: ReferencePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_affordable", lambda *_: (2, 3))
    recorded = calibration.calibration_inputs(metacanvas.checkpoint, "step")
    canvas = metacanvas.checkpoint.load_canvas()
    program = StepProgram(metacanvas.checkpoint.load_backbone(canvas), 1, order=3, keyframes=3)
    assert len(recorded) == 3
    for feed in recorded:
        assert set(feed) == {spec.name for spec in program.inputs}
        assert feed["sample"].shape == (1, CHANNELS, 3, 8, 12)
        assert feed["reference_mask"].tolist() == [[0.0]]


def test_reference_makes_videos_of_the_canvas_size(metacanvas: ReferencePipeline) -> None:
    result = metacanvas.generate("a red circle", frames=5, steps=2)
    assert [clip.shape for clip in result.clips] == [(5, 64, 96, 3)]
