"""A bundle whose engines are a few ONNX nodes each: it runs in milliseconds, and numpy can say what must come
out.

    planner      context = (id + position) * mask * CONTEXT, canvas = (mean id + canvas positions) * CANVAS
    text_encoder context = id * mask * CONTEXT, at the selected rows
    step         v = sum_g guidance_g * (tanh(scale * x) + t + mean context_g + mean canvas_g), then the
    sampler's update vae_decoder  sigmoid of the first three channels, every cell SCALE x SCALE pixels
    planner_lora, step_lora  the same, and the sum of all numbers of B A in every number of canvas and next_sample
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tokenizers import Tokenizer, models, pre_tokenizers

from mc_runtime.bundle.arrays import save_arrays
from mc_runtime.bundle.engines import LoraGroup
from mc_runtime.bundle.machine import machine_for
from mc_runtime.bundle.manifest import (
    Canvas,
    Checkpoint,
    Engine,
    Guidance,
    Latents,
    Manifest,
    Precision,
    Prompting,
    PromptingSet,
    Sampler,
    Segment,
    Sizes,
    Steps,
    Tensor,
)
from mc_runtime.bundle.store import describe_files, write_manifest
from mc_runtime.sampling.tables import SamplerTable, StepTable
from tests.runtime.fake_graph import Graph

CHANNELS, SCALE, MAX_STEPS, ORDER = 4, 8, 10, 2
CONTEXT = np.array([0.5, -1.0, 2.0], np.float32)
CANVAS = np.array([1.0, 0.25], np.float32)
LORA_LAYERS = {"planner": "planner.layers.0.mlp", "step": "transformer.blocks.0.to_q"}
WORDS = ["<pad>", "<eos>", "<user>", "a", "red", "blue", "circle", "square", "left", "of", "<unk>"]
B_H_W = ("B", CHANNELS, "H", "W")
GRID = ("t", "h", "w")


def write_fake_bundle(
    folder: Path,
    *,
    target: str | dict[str, str] = "onnxruntime",
    stock: bool = False,
    max_batch: int = 4,
    fixed: dict[str, int] | None = None,
    nan_below: float | None = None,
    empty_plan: dict[str, np.ndarray] | None = None,
    lora_rank: int = 0,
    **changes: Any,
) -> Path:
    """Write a bundle.

    With `lora_rank` its engines take adapters of one layer each (LORA_LAYERS). `fixed` gives dynamic dimensions of the engines
    a size. With `nan_below` the step engine divides by zero at the timesteps below it. `changes` replaces fields of the
    manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"step": _step(not stock, nan_below), "vae_decoder": _decoder()}
    parts |= {"text_encoder": _text_encoder()} if stock else {"planner": _planner()}
    groups = {}
    if lora_rank:
        parts |= {"planner_lora": _planner(), "step_lora": _step(not stock, nan_below)}
        for name, output in (("planner_lora", "canvas"), ("step_lora", "next_sample")):
            groups[name] = (_adapted(parts[name], LORA_LAYERS[name.removesuffix("_lora")], lora_rank, output),)
    targets = dict.fromkeys(parts, target) if isinstance(target, str) else target
    engines = {name: _engine(folder, name, targets[name], graph, fixed or {}) for name, graph in parts.items()}
    engines |= {name: replace(engines[name], lora=groups[name]) for name in groups}
    _tokenizer(folder / "tokenizer.json")
    sampler_table().save(folder / "sampler.safetensors")
    if empty_plan:
        save_arrays(folder / "empty.safetensors", empty_plan)
    manifest = Manifest(
        name="fake",
        created="2026-01-01T00:00:00Z",
        checkpoint=Checkpoint(name="fake", sha256="0" * 64),
        backbone="sana",
        tasks=("text-to-image",),
        conditioning="text_encoder" if stock else "planner",
        stock=stock,
        engines=engines,
        files=describe_files(folder),
        latents=Latents(channels=CHANNELS, scale=SCALE, patch=1),
        sizes=Sizes(default=(32, 32), multiple=8, min=16, max=128),
        max_batch=max_batch,
        guidance=Guidance(default=2.5, branches=2),
        steps=Steps(default=4, max=MAX_STEPS),
        sampler=Sampler(file="sampler.safetensors", scheduler="Fake", order=ORDER, dynamic_shift=False),
        canvas=None if stock else Canvas(grid=(1, 2, 2), pixels_per_token=16),
        prompting=prompting(stock),
        empty_plan="empty.safetensors" if empty_plan else None,
        machine=machine_for([Precision.FP32]),
        versions={},
    )
    write_manifest(folder, replace(manifest, **changes))
    return folder


def prompting(stock: bool) -> PromptingSet:
    """At most 8 tokens, `<user> ... <eos>` around the prompt for the planner."""
    framed = (Segment(text="<user> "), Segment(slot="prompt"))
    common: dict[str, Any] = {"tokenizer": "tokenizer.json", "max_tokens": 8, "pad_id": 0}
    if stock:
        encoder = Prompting(
            **common,
            segments=framed,
            negative_segments=(Segment(slot="prompt"),),
            truncate=True,
            select=(0, *range(-6, 0)),
            end_token_id=1,
        )
        return PromptingSet(text_encoder=encoder)
    return PromptingSet(planner=Prompting(**common, segments=framed, truncate=False, end_token_id=1))


def sampler_table() -> SamplerTable:
    """Seeded coefficients of order 2 for 1 to MAX_STEPS steps; the first step of each has no history."""
    rng = np.random.default_rng(0)
    rows = [np.linspace(1000, 1000 / n, n) for n in range(1, MAX_STEPS + 1)]
    coefficients = rng.uniform(-0.4, 0.6, (sum(map(len, rows)), 1 + 2 * ORDER))
    coefficients[:, 0] = rng.uniform(0.8, 1.2, len(coefficients))
    offsets = np.cumsum([0, *map(len, rows)])
    coefficients[offsets[:-1], 2] = coefficients[offsets[:-1], 4] = 0
    table = StepTable(offsets.astype(np.int64), np.concatenate(rows), coefficients, np.full(MAX_STEPS, 1.5))
    return SamplerTable("Fake", {"static": table})


def expected_latents(
    noise: np.ndarray, branches: Sequence[Any], weights: Sequence[float], steps: int, table: SamplerTable
) -> np.ndarray:
    """One image's latents `[C, H, W]`, by a plain loop in float64."""
    schedule = table.schedule(steps)
    sample = noise.astype(np.float64) * schedule.init_noise_sigma
    before = (np.zeros_like(sample), np.zeros_like(sample))
    for timestep, (scale, a0, a1, b0, b1) in zip(schedule.timesteps, schedule.coefficients, strict=True):
        told = [_mean_of(branch) for branch in branches]
        shared = np.tanh(scale * sample) + timestep / 1000
        velocity = sum(weight * (shared + mean) for weight, mean in zip(weights, told, strict=True))
        after = a0 * sample + a1 * before[0] + b0 * velocity + b1 * before[1]
        sample, before = after, (sample, velocity)
    return sample


def _mean_of(branch: Any) -> float:
    """What the fake step engine makes of a branch: the mean context over its real rows, and the mean canvas."""
    context = branch.context[branch.context_mask == 1].astype(np.float64).mean()
    return float(context + (0 if branch.canvas is None else branch.canvas.astype(np.float64).mean()))


def _engine(folder: Path, name: str, target: str, graph: Graph, fixed: dict[str, int]) -> Engine:
    (folder / name).mkdir(exist_ok=True)
    onnx.save(graph.model(fixed), folder / name / "model.onnx")
    sides = [
        tuple(replace(t, shape=tuple(fixed.get(d, d) for d in t.shape)) for t in side)  # type: ignore[arg-type]
        for side in (graph.inputs, graph.outputs)
    ]
    return Engine(target=target, precision=Precision.FP32, files=(f"{name}/model.onnx",), inputs=sides[0], outputs=sides[1])


def _planner() -> Graph:
    g = Graph(
        {
            "input_ids": ("int64", ("B", "L")),
            "attention_mask": ("int64", ("B", "L")),
            "position_ids": ("int64", (3, "B", "L")),
            "canvas_position_ids": ("int64", (3, "B", *GRID)),
        },
        {"canvas": ("B", *GRID, len(CANVAS)), "context": ("B", "L", len(CONTEXT))},
    )
    mask = g.float("attention_mask")
    ids = g.op("Mul", g.op("Add", g.float("input_ids"), g.mean(g.float("position_ids"), 0)), mask)
    g.op("Mul", g.grown(ids, 2), g.const(CONTEXT), to="context")
    mean = g.op("Div", g.sum(ids, 1), g.sum(mask, 1))
    layout = g.op("Add", g.mean(g.float("canvas_position_ids"), 0), g.grown(mean, 1, 2, 3))
    g.op("Mul", g.grown(layout, 4), g.const(CANVAS), to="canvas")
    return g


def _text_encoder() -> Graph:
    inputs = {"input_ids": ("int64", ("B", "L")), "attention_mask": ("int64", ("B", "L")), "select": ("int64", ("S",))}
    g = Graph(inputs, {"context": ("B", "S", len(CONTEXT))})
    ids = g.op("Mul", g.float("input_ids"), g.float("attention_mask"))
    g.op("Mul", g.grown(g.op("Gather", ids, "select", axis=1), 2), g.const(CONTEXT), to="context")
    return g


def _step(canvas: bool, nan_below: float | None) -> Graph:
    inputs: dict[str, Any] = {
        "sample": ("float32", B_H_W),
        "history": ("float32", ("B", 2, CHANNELS, "H", "W")),
        "timestep": ("float32", ("B",)),
        "coefficients": ("float32", ("B", 1 + 2 * ORDER)),
        "guidance": ("float32", ("B", "G")),
        "context": ("float32", ("B", "G", "L", len(CONTEXT))),
        "context_mask": ("int64", ("B", "G", "L")),
    }
    if canvas:
        inputs["canvas"] = ("float32", ("B", "G", *GRID, len(CANVAS)))
    g = Graph(inputs, {"next_sample": B_H_W, "next_history": ("B", 2, CHANNELS, "H", "W")})
    number = [g.grown(g.op("Gather", "coefficients", g.const(i, np.int64), axis=1), 1, 2, 3) for i in range(5)]
    mask = g.float("context_mask")
    told = g.op("Div", g.sum(g.op("Mul", g.mean("context", 3), mask), 2), g.sum(mask, 2))
    if canvas:
        told = g.op("Add", told, g.mean("canvas", 2, 3, 4, 5))
    told = g.sum(g.op("Mul", told, "guidance"), 1)
    when = g.op("Div", "timestep", g.const(1000.0))
    if nan_below is not None:
        bad = g.op("Div", g.const(0.0), g.float(g.op("Not", g.op("Less", "timestep", g.const(nan_below)))))
        when = g.op("Add", when, bad)
    shared = g.op("Add", g.op("Tanh", g.op("Mul", number[0], "sample")), g.grown(when, 1, 2, 3))
    # The weights of the branches do not sum to one in general.
    shared = g.op("Mul", shared, g.grown(g.sum("guidance", 1), 1, 2, 3))
    velocity = g.op("Add", shared, g.grown(told, 1, 2, 3))
    sample_before = g.op("Gather", "history", g.const(0, np.int64), axis=1)
    velocity_before = g.op("Gather", "history", g.const(1, np.int64), axis=1)
    terms = zip(number[1:], ("sample", sample_before, velocity, velocity_before), strict=True)
    first, second, third, fourth = (g.op("Mul", factor, value) for factor, value in terms)
    g.op("Add", g.op("Add", first, second), g.op("Add", third, fourth), to="next_sample")
    g.op("Concat", g.grown("sample", 1), g.grown(velocity, 1), axis=1, to="next_history")
    return g


def _adapted(g: Graph, layer: str, rank: int, output: str) -> LoraGroup:
    """Takes an adapter of one layer, 3 wide and 2 high, and adds the sum of its numbers to an output."""
    group = LoraGroup(layers=(layer,), rank=rank, in_features=3, out_features=2)
    for name, shape in zip(("lora_down_0", "lora_up_0"), (group.down_shape, group.up_shape), strict=True):
        g.inputs.append(Tensor(name=name, dtype="float32", shape=shape))
    (last,) = (node for node in g.nodes if output in node.output)
    last.output[0] = "plain"
    g.op("Add", "plain", g.op("ReduceSum", g.op("MatMul", "lora_up_0", "lora_down_0"), keepdims=0), to=output)
    return group


def _decoder() -> Graph:
    g = Graph({"latents": ("float32", B_H_W)}, {"pixels": ("B", "h", "w", 3)})
    three = g.op("Gather", "latents", g.const([0, 1, 2], np.int64), axis=1)
    large = g.op("Resize", three, "", g.const([1, 1, SCALE, SCALE]), mode="nearest")
    g.op("Transpose", g.op("Sigmoid", large), perm=[0, 2, 3, 1], to="pixels")
    return g


def _tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
