"""Stock FLUX.1 and FLUX.1-Kontext: text and pictures by our programs against diffusers' pipelines; FLUX.1-schnell's engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline

from mc_export.autoencoders.registry import vae_program
from mc_export.backbones.flux import Flux
from mc_export.build.verify import verify_engine
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.lower import lower
from mc_export.lower.onnx import OnnxFile, onnx_from_program
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Program
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_runtime.bundle.manifest import Engine, Precision
from tests.export.backbones.drive import TextDrive, assert_same_latents, denoise, schedule_of
from tests.tiny_flux import (
    FLUX_CHANNELS,
    FLUX_DIM,
    pack,
    tiny_flux,
    tiny_stock_flux,
)

STEPS = 4


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
