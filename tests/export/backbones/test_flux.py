"""FLUX.1 and FLUX.1-Kontext: the canvas, the engines, the text and whole pictures, each against diffusers or a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from torch import Tensor

from mc_export.autoencoders.registry import vae_program
from mc_export.backbones.flux import Flux, FluxKontext
from mc_export.build.verify import verify_engine
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.lower import lower
from mc_export.lower.onnx import OnnxFile, onnx_from_program
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Program
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_runtime.bundle.manifest import Engine, Precision
from mc_runtime.errors import CheckpointError
from tests.export.backbones.drive import TextDrive, assert_same_latents, denoise, schedule_of
from tests.export.test_canvas_injection import plain_step_block
from tests.factories import PLANNER_DIM
from tests.tiny_flux import (
    FLUX_CHANNELS,
    FLUX_CONTEXT_DIM,
    FLUX_DIM,
    FLUX_POOLED_DIM,
    flux_scheduler,
    tiny_flux,
    tiny_metacanvas_flux,
    tiny_stock_flux,
)

# (batch, latent height, latent width, context length, canvas grid, reference height, reference width)
SHAPES = [(1, 10, 6, 4, (1, 2, 2), 4, 14), (3, 6, 8, 9, (1, 5, 3), 2, 2)]
STEPS = 4


def inputs(shape: tuple, seed: int) -> dict[str, Tensor]:
    batch, height, width, length, grid, *reference = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length)
    mask[-1, length // 2 + 1 :] = 0
    return {
        "sample": torch.randn(batch, FLUX_CHANNELS, height, width, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "context": torch.randn(batch, length, FLUX_CONTEXT_DIM, generator=generator),
        "context_mask": mask,
        "canvas": torch.randn(batch, *grid, FLUX_DIM, generator=generator),
        "pooled": torch.randn(batch, FLUX_POOLED_DIM, generator=generator),
        "guidance_scale": torch.linspace(2.3, 4.7, batch),
        "reference": torch.randn(batch, FLUX_CHANNELS, *reference, generator=generator),
        "has_reference": (torch.arange(batch) % 2 == 0).float(),
    }


def pack(latents: Tensor) -> Tensor:
    """diffusers' own."""
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)


def ids(height: int, width: int, picture: int) -> Tensor:
    """diffusers' own."""
    found = FluxKontextPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    found[:, 0] = picture
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_projections_leave_the_backbone_bit_identical(shape: tuple) -> None:
    """As published: no attention mask at all, the reference behind the target, the target's predictions kept."""
    model = tiny_flux(seed=11)
    connector = CanvasConnector(PLANNER_DIM, FLUX_DIM)
    feeds = inputs(shape, seed=5)
    feeds |= {"context_mask": torch.ones_like(feeds["context_mask"]), "has_reference": torch.ones(shape[0])}
    sample, reference = feeds["sample"], feeds["reference"]
    with torch.no_grad():
        published = model(
            hidden_states=torch.cat([pack(sample), pack(reference)], dim=1),
            timestep=feeds["timestep"] / 1000,
            guidance=feeds["guidance_scale"],
            pooled_projections=feeds["pooled"],
            encoder_hidden_states=feeds["context"],
            txt_ids=torch.zeros(feeds["context"].shape[1], 3),
            img_ids=torch.cat([ids(*sample.shape[2:], 0), ids(*reference.shape[2:], 1)]),
            return_dict=False,
        )[0]
        injected = CanvasBackbone(FluxKontext(), model, connector)(**feeds)
    height, width = sample.shape[2:]
    expected = FluxKontextPipeline._unpack_latents(published[:, : height * width // 4], 2 * height, 2 * width, 2)
    assert torch.equal(injected, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_projections_equal_a_plain_loop(shape: tuple) -> None:
    model = tiny_flux(seed=12)
    connector = CanvasConnector(PLANNER_DIM, FLUX_DIM).eval()
    randomize_projections(connector, seed=13)
    feeds = inputs(shape, seed=6)
    with torch.no_grad():
        injected = CanvasBackbone(FluxKontext(), model, connector)(**feeds)
        plain = plain_prediction(model, connector, **feeds)
        without = CanvasBackbone(FluxKontext(), tiny_flux(seed=12), None)(**{**feeds, "canvas": None})
    torch.testing.assert_close(injected, plain, atol=2e-5, rtol=1e-4)
    assert (injected - without).abs().max() > 0.05, "the canvas must reach the output"


def plain_prediction(
    model: Any,
    connector: CanvasConnector,
    sample: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_mask: Tensor,
    canvas: Tensor,
    pooled: Tensor,
    guidance_scale: Tensor,
    reference: Tensor,
    has_reference: Tensor,
) -> Tensor:
    """The model's parts called one by one, a sample at a time, without what a mask would hide."""
    results = []
    for row in range(len(sample)):
        one = slice(row, row + 1)
        height, width = (extent // 2 for extent in sample.shape[2:])
        target = model.x_embedder(pack(sample[one]))
        resized = F.interpolate(canvas[one].permute(0, 4, 1, 2, 3), size=(1, height, width), mode="trilinear")
        fused = target + resized[:, :, 0].flatten(2).transpose(1, 2)
        hidden = [target + plain_step_block(connector.step_block, fused, timestep[one], height, width)]
        text = model.context_embedder(context[one, : int(context_mask[row].sum())])
        positions = [torch.zeros(text.shape[1], 3), ids(*sample.shape[2:], 0)]
        if has_reference[row]:
            hidden.append(model.x_embedder(pack(reference[one])))
            positions.append(ids(*reference.shape[2:], 1))
        states = torch.cat(hidden, dim=1)
        rotary = model.pos_embed(torch.cat(positions))
        modulation = model.time_text_embed(timestep[one], guidance_scale[one] * 1000, pooled[one])
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, states = block(states, text, modulation, rotary)
        output = model.proj_out(model.norm_out(states, modulation))[:, : height * width]
        results.append(FluxKontextPipeline._unpack_latents(output, 4 * height, 4 * width, 2))
    return torch.cat(results)


def test_without_a_reference_any_reference_serves() -> None:
    model = tiny_flux(seed=14)
    feeds = {**inputs(SHAPES[0], seed=7), "canvas": None}
    edit = CanvasBackbone(FluxKontext(), model, None)
    draw = CanvasBackbone(Flux(), model, None)
    shared = {name: tensor for name, tensor in feeds.items() if "reference" not in name}
    with torch.no_grad():
        expected = draw(**shared)
        for reference in (feeds["reference"], torch.zeros(1, FLUX_CHANNELS, 2, 2)):
            found = edit(**shared, reference=reference, has_reference=torch.zeros(1))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (edit(**feeds | {"has_reference": torch.ones(1)}) - expected).abs().max() > 0.01


# Sizes of the dynamic dimensions other than those exported at; pictures of two latent cells a token.
STEP_SHAPES = [{"B": 1, "G": 1, "H": 10, "W": 6, "L": 3}, {"B": 3, "G": 2, "H": 6, "W": 18, "L": 11}]
Exported = tuple[Program, OnnxFile]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The step of a stock FLUX.1-schnell, which takes no guidance scale and is none of the generated matrix."""
    model = tiny_flux(seed=21, num_layers=1, num_single_layers=0, guidance_embeds=False)
    program = StepProgram(CanvasBackbone(Flux(), model, None), FLUX_DIM)
    path = tmp_path_factory.mktemp("flux") / "schnell.onnx"
    return program, onnx_from_program(export_program(program), program.inputs, program.outputs, path)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision", "tolerance"),
    [("onnxruntime", Precision.FP32, 2e-5), ("openvino", Precision.FP32, 2e-5), ("openvino", Precision.BF16, 3e-2)],
)
def test_a_distilled_models_engines_equal_their_program(
    distilled: Exported, target: str, precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    """In bf16, torch's own autocast is off as much."""
    program, onnx = distilled
    files, options = lower(target, onnx, program.component, precision, [], tmp_path)
    spec = Engine(
        target=target, precision=precision, files=tuple(file.name for file in files),
        inputs=program.inputs, outputs=program.outputs, options=options,
    )  # fmt: skip
    feeds = [program.example(shape, seed=seed) for seed, shape in enumerate(STEP_SHAPES)]
    for feed in feeds:  # the prediction is the result: it does not drown in the sample
        feed["coefficients"] = torch.tensor([[1.0, 0.0, 1.0]]).expand(len(feed["sample"]), -1)
    error = verify_engine(program, spec, files, feeds, tolerance=tolerance)
    assert error.relative_l2 > 0, "an exact match of floats means that nothing was compared"


@pytest.mark.matrix
@pytest.mark.slow
def test_nothing_of_the_step_depends_on_the_context_alone(distilled: Exported) -> None:
    operators = distilled[1].operators()
    assert operators["Softmax"] == 1
    # A last double block: q, k, v, out and two of the feed-forward network of the picture's stream; q, k, v of the text's;
    # scores and values; the picture's embedding and the last projection. No product of the context's own embedding.
    assert operators["MatMul"] == 6 + 3 + 2 + 2
    assert operators["Sin"] == 2, "the timestep's, and the rotary positions'"


class Pair(NamedTuple):
    """diffusers' pipeline of a tiny checkpoint, and our programs of the same."""

    pipeline: Any
    checkpoint: Checkpoint
    text: TextDrive
    step: StepProgram
    encoder: Program


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """`pairs(kind)`."""
    folder = tmp_path_factory.mktemp("stock")
    kinds: dict[str, dict[str, Any]] = {
        "kontext": {"kind": "flux-kontext"},
        "dev": {"kind": "flux"},
        "schnell": {"kind": "flux", "guidance_embeds": False, "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0)},
    }

    @cache
    def pair(kind: str) -> Pair:
        checkpoint = load_checkpoint(tiny_stock_flux(folder / kind, seed=31, **kinds[kind]))
        pipeline = (FluxKontextPipeline if kind == "kontext" else FluxPipeline).from_pretrained(str(folder / kind))
        pipeline.set_progress_bar_config(disable=True)
        backbone = checkpoint.backbone
        text = TextDrive(
            backbone,
            checkpoint.load_text_encoders(),
            checkpoint.load_tokenizers(),
            checkpoint.load_model(),
            folder / f"{kind}-text",
        )
        step = StepProgram(checkpoint.load_backbone(None), backbone.prepared_context_width(checkpoint.model_config)).eval()
        return Pair(pipeline, checkpoint, text, step, vae_program("vae_encoder", checkpoint.load_vae()).eval())

    return pair


def test_text_equals_the_pipelines(pairs: Callable[[str], Pair]) -> None:
    """At the pipelines' lengths; the last prompt is cut by both tokenizers."""
    pipeline, text_of = pairs("kontext").pipeline, pairs("kontext").text
    prompts = ["a red circle left of a blue square", "", "Größe <b> {x}", "two green triangles " * 150]
    with torch.no_grad():
        context, pooled, _ = pipeline.encode_prompt(prompts, prompts)
        text = text_of(prompts)
        torch.testing.assert_close(text.context, pipeline.transformer.context_embedder(context), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(text.pooled, pooled, atol=2e-5, rtol=1e-4)
    assert text.context.shape[1] == 512
    assert text.mask.all(), "padding counts"


@pytest.mark.parametrize(
    ("kind", "size", "count", "edits", "scale", "true_scale"),
    [
        ("kontext", (10, 18), 2, True, 2.5, 1.0),
        ("kontext", (16, 12), 1, True, 4.3, 3.0),
        ("kontext", (10, 18), 1, False, 2.5, 1.0),
        ("dev", (16, 12), 2, False, 4.3, 1.0),
        ("dev", (10, 18), 1, False, 1.0, 2.5),
        ("schnell", (10, 18), 2, False, 0.0, 1.0),
    ],
)
def test_final_latents_equal_the_pipelines(
    pairs: Callable[[str], Pair],
    kind: str,
    size: tuple[int, int],
    count: int,
    edits: bool,
    scale: float,
    true_scale: float,
) -> None:
    pair = pairs(kind)
    pipeline = pair.pipeline
    prompts, negative = ["make the red circle blue", "two green triangles"][:count], ["blurry"] * count
    generator = torch.Generator().manual_seed(41)
    height, width = size
    noise = torch.randn(count, FLUX_CHANNELS, height, width, generator=generator)
    picture = torch.rand(1, 12, 28, 3, generator=generator)
    arguments: dict[str, Any] = {}
    conditions = {}
    if kind == "kontext":
        image = picture.permute(0, 3, 1, 2) if edits else None
        arguments = {"image": image, "max_area": 4 * height * width, "_auto_resize": False}
        latents = pair.encoder.run({"pixels": picture})["latents"] if edits else torch.zeros(1, FLUX_CHANNELS, 2, 2)
        conditions = {"reference": latents.expand(count, -1, -1, -1), "has_reference": torch.full((count,), float(edits))}
    if kind != "schnell":
        conditions["guidance_scale"] = torch.full((count,), scale)
    expected = pipeline(
        prompt=prompts,
        negative_prompt=negative if true_scale > 1 else None,
        true_cfg_scale=true_scale,
        guidance_scale=scale,
        height=2 * height,
        width=2 * width,
        num_inference_steps=STEPS,
        latents=pack(noise),
        output_type="latent",
        **arguments,
    ).images
    expected = pipeline._unpack_latents(expected, 2 * height, 2 * width, 2)
    told = [pair.text(prompts)]
    if true_scale > 1:
        told.append(pair.text(negative, negative=True))
    weights = [true_scale, 1 - true_scale] if true_scale > 1 else [1.0]
    tokens = height * width // 4
    schedule = schedule_of(pair.checkpoint.backbone, pipeline.transformer, pair.checkpoint.load_scheduler(), STEPS, tokens)
    assert_same_latents(denoise(pair.step, schedule, noise, told, weights, conditions=conditions), expected)


def test_metacanvas_checkpoint_is_whole(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "metacanvas", seed=51))
    canvas = checkpoint.load_canvas()
    assert checkpoint.backbone.name == "flux-kontext"
    assert canvas.pooled_connector is not None
    assert canvas.pooled_connector.proj_out.out_features == FLUX_POOLED_DIM
    assert checkpoint.load_backbone(canvas).connector is canvas.canvas_connector


def test_a_canvas_says_how_large_pictures_are(tmp_path: Path) -> None:
    """FLUX's configuration names no size. Pictures to edit keep Kontext's proportions, at the area of the checkpoint's own."""
    checkpoint = load_checkpoint(tiny_metacanvas_flux(tmp_path / "metacanvas", seed=51))
    assert checkpoint.default_size == (32, 32)
    assert (20, 48) in checkpoint.reference_sizes  # of 672 x 1568, in multiples of 4 pixels
    assert (32, 32) in checkpoint.reference_sizes
    stock = load_checkpoint(tiny_stock_flux(tmp_path / "stock", seed=51))
    assert {(672, 1568), (1024, 1024)} < set(stock.reference_sizes)


def test_other_flux_pipelines_are_refused(tmp_path: Path) -> None:
    """They share the class of the model, but not what it takes."""
    folder = tiny_stock_flux(tmp_path / "checkpoint", seed=52, kind="flux", num_layers=1, num_single_layers=1)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxFillPipeline"'))
    with pytest.raises(CheckpointError, match=r"no supported backbone .* of FluxFillPipeline; .*of FluxKontextPipeline"):
        load_checkpoint(folder)
    config = tiny_flux(seed=1, in_channels=24, out_channels=16).config
    assert "takes 24 channels and gives 16" in (Flux().refusal(config) or "")
    assert Flux().refusal(tiny_flux(seed=1).config) is None


def test_schedules_follow_the_targets_tokens() -> None:
    scheduler = flux_scheduler()
    Flux().set_timesteps(scheduler)(scheduler, 5, 4096)
    high = scheduler.timesteps.clone()
    Flux().set_timesteps(scheduler)(scheduler, 5, 1024)
    assert (high[1:] > scheduler.timesteps[1:]).all()
