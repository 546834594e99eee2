"""The engine programs, in torch: each against the published modules it is made of."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.embeddings import Timesteps
from torch import nn

from mc_export.autoencoders.registry import vae_program
from mc_export.backbones.sana import Sana
from mc_export.backbones.sana_export import LinearAttention
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.lower.onnx import onnx_from_program
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Axis, Program, float_tensor
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_export.program.text_encoder import TextEncoderProgram
from mc_export.program.timesteps import SharedSinusoids
from mc_runtime.errors import EngineError
from tests.factories import CONTEXT_DIM, tiny_sana, tiny_text_encoder, tiny_vae


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_step_is_scaling_prediction_guidance_and_update(order: int, branches: int) -> None:
    model = tiny_sana(seed=1)
    context = Sana().context_preparation(model)
    published = CanvasBackbone(Sana(), tiny_sana(seed=1), None).eval()
    program = StepProgram(CanvasBackbone(Sana(), model, None), Sana().prepared_context_width(model.config), order=order).eval()
    feed = program.example({"B": 2, "G": branches, "H": 5, "W": 7, "L": 6}, seed=3)
    raw = torch.randn(2, branches, 6, CONTEXT_DIM, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        outputs = program.run({**feed, "context": context(raw)})
        for image in range(2):
            scale, *weights = feed["coefficients"][image]
            sample = feed["sample"][image]
            timestep = feed["timestep"][image : image + 1]
            guided = sum(
                feed["guidance"][image, branch]
                * published(
                    (scale * sample)[None], timestep, raw[image, branch][None], feed["context_mask"][image, branch][None]
                )[0]
                for branch in range(branches)
            )
            past = feed["history"][image] if order > 1 else torch.empty(0)
            samples, predictions = [sample, *past[: order - 1]], [guided, *past[order - 1 :]]
            expected = sum(weight * term for weight, term in zip(weights, [*samples, *predictions], strict=True))
            close(outputs["next_sample"][image], expected)
            if order > 1:
                close(outputs["next_history"][image], torch.stack([*samples[:-1], *predictions[:-1]]))


def test_step_drops_a_learned_variance() -> None:
    model = tiny_sana(seed=2, out_channels=8)
    published = CanvasBackbone(Sana(), tiny_sana(seed=2, out_channels=8), None).eval()
    context = Sana().context_preparation(model)
    program = StepProgram(CanvasBackbone(Sana(), model, None), Sana().prepared_context_width(model.config)).eval()
    feed = program.example({"B": 1, "G": 1, "H": 4, "W": 4, "L": 5})
    feed["coefficients"] = torch.tensor([[1.0, 0.0, 1.0]])
    raw = torch.randn(1, 1, 5, CONTEXT_DIM)
    with torch.no_grad():
        expected = published(feed["sample"], feed["timestep"], raw[0], feed["context_mask"][0])
        close(program.run({**feed, "context": context(raw)})["next_sample"], expected)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm_across_heads"])
def test_prepared_context_gives_the_published_prediction(qk_norm: str | None) -> None:
    model, prepared = tiny_sana(seed=5, qk_norm=qk_norm), tiny_sana(seed=5, qk_norm=qk_norm)
    raw = torch.randn(2, 9, CONTEXT_DIM)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    sample, timestep = torch.randn(2, 4, 6, 5), torch.tensor([900.0, 3.5])
    context = Sana().context_preparation(prepared)
    Sana().prepare_for_export(prepared)
    with torch.no_grad():
        states = context(raw)
        assert states.shape[-1] == Sana().prepared_context_width(model.config)
        actual = CanvasBackbone(Sana(), prepared, None)(sample, timestep, states, mask)
        close(actual, CanvasBackbone(Sana(), model, None)(sample, timestep, raw, mask))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (2, 4), (7, 5)])
def test_decoder_equals_the_published_one_on_both_sides_of_its_branch(size: tuple[int, int]) -> None:
    """Eight channels a head: the published attention is quadratic up to eight cells and linear above."""
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1))
    vae = tiny_vae(seed=3)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
        actual = vae_program("vae_decoder", tiny_vae(seed=3)).eval().run({"latents": latents})["pixels"]
    close(actual, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def test_encoder_equals_the_published_one() -> None:
    pixels = torch.rand(2, 12, 20, 3, generator=torch.Generator().manual_seed(2))
    vae = tiny_vae(seed=3)
    with torch.no_grad():
        expected = vae.encode(pixels.permute(0, 3, 1, 2) * 2 - 1).latent * vae.config.scaling_factor
        close(vae_program("vae_encoder", tiny_vae(seed=3)).eval().run({"pixels": pixels})["latents"], expected)


def test_text_encoder_equals_the_published_one_across_its_window() -> None:
    encoder, _ = tiny_text_encoder(seed=4)
    length = 3 * encoder.config.sliding_window // 2
    program = TextEncoderProgram(Sana(), [tiny_text_encoder(seed=4)[0]], nn.Identity(), CONTEXT_DIM).eval()
    feed = program.example({"B": 3, "L": length, "S": 11})
    with torch.no_grad():
        states = encoder(feed["input_ids"], attention_mask=feed["attention_mask"]).last_hidden_state
    expected, actual = states[:, feed["select"]], program.run(feed)["context"]
    real = feed["attention_mask"][:, feed["select"]].bool()
    assert real.sum() > 20
    close(actual[real], expected[real])


class _ZeroKeys(Program):
    """Linear attention whose keys are all zero: its denominator is then nothing but the published 1e-15."""

    component = "attention"
    inputs = (float_tensor("x", "B", "N", 64),)
    outputs = (float_tensor("y", "B", "N", 64),)
    axes = {"B": Axis("B", 1, 8, 2), "N": Axis("N", 1, 64, 9)}  # noqa: RUF012  # read only

    def __init__(self, processor: object) -> None:
        super().__init__()
        self.attn = Attention(query_dim=64, heads=2, dim_head=32, bias=False, processor=processor)
        nn.init.zeros_(self.attn.to_k.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x)

    def example(self, extents, seed=0):
        return {"x": torch.randn(extents["B"], extents["N"], 64, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize(("processor", "survives"), [(LinearAttention(), True), (SanaLinearAttnProcessor2_0(), False)])
def test_linear_attention_survives_the_onnx_optimiser(processor: object, survives: bool, tmp_path: Path) -> None:
    """The optimiser drops additions of less than 1e-8; the published processor shows that it still does."""
    program = _ZeroKeys(processor).eval()
    feed = program.example({"B": 1, "N": 7})
    expected = program.run(feed)["y"]
    close(expected, program.attn.to_out[0].bias.expand_as(expected))
    graph = onnx_from_program(export_program(program), program.inputs, program.outputs, tmp_path / "attention.onnx")
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    result = session.run(None, {"x": feed["x"].numpy()})[0]
    assert np.isfinite(result).all() == survives
    if survives:
        close(torch.from_numpy(result), expected)


def test_shared_sinusoids_equal_the_layers_they_replace() -> None:
    kinds = [Timesteps(64, True, 0), Timesteps(64, False, 0), Timesteps(32, True, 1, scale=2)]
    again = Timesteps(64, True, 0)
    layers = nn.ModuleList([*kinds, nn.ModuleList([again])])
    timesteps = torch.tensor([0.0, 3.25, 987.5])
    expected = [kind(timesteps) for kind in kinds]
    shared = SharedSinusoids(layers, ["0", "1", "2", "3.0"])
    sinusoids = shared(timesteps)
    assert len(sinusoids) == len(kinds)
    for actual, wanted in zip(sinusoids, expected, strict=True):
        close(actual, wanted)
    shared.publish(sinusoids)
    for layer, wanted in zip([*layers[:3], layers[3][0]], [*expected, expected[0]], strict=True):
        close(layer(timesteps), wanted)


def test_shared_sinusoids_of_several_numbers_a_sample() -> None:
    """SDXL's six sizes: what the layer gives for them as one list, sample after sample."""
    layers = nn.ModuleList([Timesteps(16, True, 0)])
    sizes = torch.tensor([[1024.0, 768, 0, 8, 640, 512], [37, 1411, 3, 0, 1000, 7]])
    expected = layers[0](sizes.flatten())
    (rows,) = SharedSinusoids(layers, ["0"], rank=2)(sizes)
    assert rows.shape == (2, 6, 16)
    close(rows.flatten(0, 1), expected)


def test_sinusoids_of_a_program_in_bf16_stay_exact() -> None:
    exact, rounded = (StepProgram(CanvasBackbone(Sana(), tiny_sana(seed=1), None), 1) for _ in range(2))
    compute_in_bf16(rounded)
    timestep = torch.tensor([987.5, 12.3])
    for found, expected in zip(rounded.sinusoids(timestep), exact.sinusoids(timestep), strict=True):
        assert torch.equal(found, expected)


def test_only_timestep_embeddings_of_pairs_can_be_shared() -> None:
    for layer in (nn.Linear(2, 2), Timesteps(31, True, 0)):
        with pytest.raises(ValueError, match="no timestep embedding"):
            SharedSinusoids(nn.ModuleList([layer]), ["0"])


class _BakedIn(Program):
    """A program that takes its batch for a constant."""

    component = "baked"
    inputs = (float_tensor("x", "B", 3),)
    outputs = (float_tensor("y", "B", 3),)
    axes = {"B": Axis("B", 1, 8, 2)}  # noqa: RUF012  # read only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(1, 1 + int(x.shape[0]) * 0 + 3) + torch.tensor(2.0 if x.shape[0] == 2 else 0.0)

    def example(self, extents, seed=0):
        return {"x": torch.ones(extents["B"], 3)}


def test_export_notices_a_size_that_was_baked_in() -> None:
    with pytest.raises(EngineError, match="baked"):
        export_program(_BakedIn())


@pytest.mark.parametrize(("least", "most", "example", "multiple"), [(1, 8, 9, 1), (1, 8, 1, 1), (4, 16, 6, 4)])
def test_an_axis_that_cannot_be_exported_is_refused(least: int, most: int, example: int, multiple: int) -> None:
    with pytest.raises(ValueError, match="axis H"):
        Axis("H", least, most, example, multiple)


def test_checked_sizes_are_not_the_exported_ones() -> None:
    program = vae_program("vae_encoder", tiny_vae(seed=3))
    for extents in program.check_extents():
        assert all(extents[name] != size for name, size in program.example_extents.items())
        assert all(extents[name] % axis.multiple == 0 for name, axis in program.axes.items())
    sizes = list(itertools.chain.from_iterable(extents.values() for extents in program.check_extents()))
    assert 1 in sizes
