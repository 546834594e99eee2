"""LoRAs as inputs of a bundle's engines give what diffusers and PEFT give, and leave everything else as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from safetensors.torch import load_file, save_file

from mc_export.build import BuildOptions
from mc_runtime import Runtime
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import RequestError
from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana
from tests.program_bundle import programs_as_engines
from tests.random_lora import LAYERS, random_lora

pytestmark = [pytest.mark.integration, pytest.mark.slow]

STEPS = 3
RANK = 6
PROMPTS = ["a red circle", "two green triangles"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Runtime]]:
    """Builds bundles whose engines are programs that were not exported."""
    with programs_as_engines(tmp_path_factory.mktemp("cache")) as builder:
        yield builder


@pytest.fixture(scope="module")
def stock(build: Callable[..., Runtime], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runtime, dict[str, Path]]:
    """diffusers' pipeline, the runtime of the same checkpoint, and two adapters, one of them of the self-attention alone."""
    folder = tmp_path_factory.mktemp("lora")
    checkpoint = tiny_stock_sana(folder / "checkpoint")
    pipeline = SanaPipeline.from_pretrained(str(checkpoint))
    pipeline.set_progress_bar_config(disable=True)
    files = {
        "all": random_lora(pipeline, folder / "all", seed=1, rank=4, alpha=6.0, layers=LAYERS),
        "self": random_lora(pipeline, folder / "self", seed=2, rank=2, alpha=2.0, layers=LAYERS[:2]),
    }
    runtime = build(checkpoint, folder / "bundle", lora_rank=RANK)
    for name, file in files.items():
        runtime.load_lora(file, name)
        pipeline.load_lora_weights(str(file), adapter_name=name)
    return pipeline, runtime, files


def noise(size: tuple[int, int], count: int) -> Any:
    return np.random.default_rng(8).standard_normal((count, 4, size[0] // 4, size[1] // 4)).astype(np.float32)


def pipelines_latents(pipeline: Any, size: tuple[int, int], scales: dict[str, float], guidance: float, count: int) -> Any:
    pipeline.set_adapters(list(scales), list(scales.values())) if scales else pipeline.disable_lora()
    latents = pipeline(
        PROMPTS[:count], negative_prompt="", height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=guidance,
        latents=torch.from_numpy(noise(size, count)), output_type="latent", use_resolution_binning=False,
    ).images  # fmt: skip
    pipeline.enable_lora()
    return latents.numpy()


@pytest.mark.parametrize(
    ("scales", "size", "guidance", "count"),
    [
        ({"all": 1.0}, (32, 32), 4.5, 1),
        ({"all": -0.7}, (64, 32), 1.0, 2),
        ({"all": 0.6, "self": 1.3}, (32, 64), 4.5, 2),
        ({"self": 1.0}, (32, 32), 4.5, 1),
        ({}, (32, 32), 4.5, 1),
    ],
)
def test_latents_equal_diffusers_with_the_same_adapters(
    stock: tuple[Any, Runtime, dict[str, Path]], scales: dict[str, float], size: tuple[int, int], guidance: float, count: int
) -> None:
    pipeline, runtime, _ = stock
    expected = pipelines_latents(pipeline, size, scales, guidance, count)
    found = runtime.generate(
        PROMPTS[:count], size=size, steps=STEPS, guidance_scale=guidance, latents=noise(size, count), output="latents",
        lora=scales,
    ).latents  # fmt: skip
    assert np.abs(found - expected).max() < 3e-4 * (expected.max() - expected.min())
    if scales:
        plain = pipelines_latents(pipeline, size, {}, guidance, count)
        assert np.abs(plain - expected).max() > 5e-3 * (expected.max() - expected.min())


def test_requests_without_adapters_run_the_plain_engines_and_one_part_alone_leaves_the_other(
    stock: tuple[Any, Runtime, dict[str, Path]],
) -> None:
    _, runtime, _ = stock
    active = runtime._loras.active({"self": 0.5})
    assert active.engine("step") == "step_lora"
    assert active.engine("text_encoder") == "text_encoder"
    assert runtime._loras.active({"all": 0.0}).engine("step") == "step"
    plan = runtime.plan(PROMPTS[0], lora={"all": 0.5})
    rendered = runtime.render(plan, steps=STEPS, output="latents").latents
    assert np.array_equal(rendered, runtime.generate(PROMPTS[0], steps=STEPS, output="latents", lora={"all": 0.5}).latents)


def test_wrong_adapters_are_refused(stock: tuple[Any, Runtime, dict[str, Path]], tmp_path: Path) -> None:
    _, runtime, files = stock
    weights = load_file(files["all"])
    key = next(iter(weights))

    def doubled(of_a: int, of_b: int) -> dict[str, torch.Tensor]:
        """Every weight twice, along another dimension in A and in B."""
        return {name: torch.cat([weight, weight], dim=of_a if "lora_A" in name else of_b) for name, weight in weights.items()}

    cases = {
        "foreign": ({f"transformer.elsewhere.0.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, "no layer that"),
        "kohya": ({"lora_unet_blocks_0.lora_down.weight": torch.ones(2, 2)}, "save_lora_weights"),
        "half": ({key: weights[key]}, "only"),
        "nan": ({**weights, key: weights[key] * float("nan")}, "not finite"),
        "conv": ({name: weight[..., None, None] for name, weight in weights.items()}, "linear layers"),
        "wide": (doubled(-1, 0), "another model"),
        "high": (doubled(0, -1), "--lora-rank 8"),
    }
    for name, (tensors, said) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        with pytest.raises(RequestError, match=said):
            runtime.load_lora(file)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RequestError, match="not a readable"):
        runtime.load_lora(tmp_path / "broken.safetensors")
    with pytest.raises(RequestError, match="no such LoRA"):
        runtime.load_lora(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="there is all, self"):
        runtime.generate(PROMPTS[0], lora="other")
    runtime.load_lora(files["all"], "again")
    with pytest.raises(RequestError, match="rank 10 together"):
        runtime.generate(PROMPTS[0], lora=["all", "self", "again"])
    runtime.unload_lora("again")
    assert runtime.loras == ("all", "self")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_are_widened(
    stock: tuple[Any, Runtime, dict[str, Path]], tmp_path: Path, dtype: torch.dtype
) -> None:
    _, _, files = stock
    from mc_runtime.lora import read_adapter

    weights = {name: weight.to(dtype) for name, weight in load_file(files["self"]).items()}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    save_file(weights, tmp_path / "half.safetensors", metadata=metadata)
    adapter = read_adapter(tmp_path / "half.safetensors")
    assert adapter.name == "half"
    for layer, (down, up) in adapter.layers.items():
        assert np.array_equal(down, weights[f"{layer}.lora_A.weight"].float().numpy())
        assert np.array_equal(up, weights[f"{layer}.lora_B.weight"].float().numpy() * 2)  # alpha 4 of rank 2


def test_a_planners_adapter_acts_as_the_checkpoints_own(build: Callable[..., Runtime], tmp_path: Path) -> None:
    """The same adapter, once in the checkpoint's `planner_lora`, where PEFT's numbers were compared, once beside the bundle."""
    plain = tiny_metacanvas_checkpoint(tmp_path / "plain", seed=3, lora=False)
    adapted = tiny_metacanvas_checkpoint(tmp_path / "adapted", seed=3, lora=True)
    own = build(adapted, tmp_path / "own")
    given = build(plain, tmp_path / "given", lora_rank=RANK)
    name = given.load_lora(adapted / "planner_lora")
    expected = own.plan(PROMPTS[0]).branches[0]
    found = given.plan(PROMPTS[0], lora=name).branches[0]
    without = given.plan(PROMPTS[0]).branches[0]
    assert expected.canvas is not None
    assert found.canvas is not None
    assert without.canvas is not None
    assert np.abs(found.canvas - expected.canvas).max() < 1e-4 * np.abs(expected.canvas).max()
    assert np.abs(without.canvas - expected.canvas).max() > 1e-2 * np.abs(expected.canvas).max()
    assert np.array_equal(found.context, without.context)  # the instruction's rows are not adapted


def test_builds_that_cannot_take_adapters_say_so(build: Callable[..., Runtime], tmp_path: Path) -> None:
    checkpoint = tiny_stock_sana(tmp_path / "checkpoint")
    with pytest.raises(RequestError, match="text_encoder=onnxruntime:fp32"):
        build(checkpoint, tmp_path / "bundle", precision=Precision.INT8, lora_rank=4)
    with pytest.raises(RequestError, match="inductor-cuda merges"):
        build(checkpoint, tmp_path / "bundle", target="inductor-cuda", lora_rank=4)
    with pytest.raises(RequestError, match="lora_rank must be"):
        BuildOptions(lora_rank=-1)
    plain = build(checkpoint, tmp_path / "plain")
    save_file({f"transformer.a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, tmp_path / "any.safetensors")
    with pytest.raises(RequestError, match="takes no LoRA; build the bundle again with `mc-runtime build … --lora-rank 2`"):
        plain.load_lora(tmp_path / "any.safetensors")
