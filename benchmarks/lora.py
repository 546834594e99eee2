"""What `--lora-rank` costs: a step without an adapter, with one of zeros, with one of full rank; and changing adapters.

    python -m benchmarks.lora

The checkpoint is SANA's at mid size. Every way first makes the same latents (adapters of zeros change none), then all of them
run in turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from benchmarks import models, report
from benchmarks.bundles import VARIANTS
from benchmarks.checkpoints import metacanvas_checkpoint, work_folder
from mc_export.build import BuildOptions, build_bundle
from mc_runtime import Runtime
from mc_runtime.bundle.manifest import Manifest
from mc_runtime.lora.shelf import LoraShelf

PROMPT = "a red circle left of a blue square"
RANK = 16
MOST_WITHOUT = 1.03
"""Wanted of a step that has no adapter, against the same in a bundle that takes none."""
SWITCHES = 20


def adapter(manifest: Manifest, file: Path, scale: float) -> Path:
    """A LoRA of rank `RANK` for every layer of the step, random A and B, B times `scale`."""
    generator = np.random.default_rng(5)
    tensors: dict[str, NDArray[np.float32]] = {}
    for group in manifest.engines["step_lora"].lora:
        for layer in group.layers:
            down = generator.standard_normal((RANK, group.in_features), np.float32) * np.float32(group.in_features**-0.5)
            up = generator.standard_normal((group.out_features, RANK), np.float32) * np.float32(scale)
            tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file(tensors, file)
    return file


def measure(variant: str, checkpoint: Path, work: Path, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """One variant of the checkpoint, built with and without `--lora-rank`."""
    target, precision, _ = VARIANTS[variant]
    runtimes = {}
    for rank in (0, RANK):
        folder = work / "bundles" / f"{checkpoint.name}-{variant.replace(' ', '-')}-lora{rank}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        options = BuildOptions(target=target, precision=precision, max_batch=1, lora_rank=rank)
        build_bundle(checkpoint, folder, options, lambda event: report.console.print(str(event), style="dim"))
        runtimes[rank] = Runtime.load(folder, threads=threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = {
            name: adapter(runtimes[RANK].manifest, Path(scratch) / f"{name}.safetensors", scale)
            for name, scale in (("zeros", 0.0), ("full", 0.01))
        }
        for file in files.values():
            runtimes[RANK].load_lora(file)
        ways: dict[str, tuple[Runtime, Mapping[str, float]]] = {
            "built without --lora-rank": (runtimes[0], {}),
            "no adapter": (runtimes[RANK], {}),
            "an adapter of zeros": (runtimes[RANK], {"zeros": 1.0}),
            f"an adapter of rank {RANK}": (runtimes[RANK], {"full": 1.0}),
        }
        plans = {name: runtime.plan(PROMPT, lora=lora) for name, (runtime, lora) in ways.items()}

        def render(name: str) -> Any:
            return ways[name][0].render(plans[name], steps=steps, guidance_scale=4.5, output="latents")

        latents = {name: render(name).latents for name in ways}
        card = report.card()
        order = random.Random(0)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in order.sample(list(ways), len(ways)):
                seconds[name].append(render(name).timings["denoise"] / steps)
        switching = _switching(runtimes[RANK].manifest, files["full"])
    first, *others = ways
    plain = latents[first]
    ratios = {
        name: statistics.median(own / base for own, base in zip(seconds[name], seconds[first], strict=True)) for name in others
    }
    return {
        **card,
        "variant": variant,
        "rounds": rounds,
        "steps": steps,
        "seconds_a_step": {name: statistics.median(each) for name, each in seconds.items()},
        "step_against_without": ratios,
        "latents_relative_l2": {
            name: float(np.linalg.norm(latents[name] - plain) / np.linalg.norm(plain)) for name in others
        },
        "switching_milliseconds": {"median": 1e3 * statistics.median(switching), "max": 1e3 * max(switching)},
        "bars": [report.bar(f"{variant}: a step without an adapter", ratios["no adapter"], at_most=MOST_WITHOUT)],
    }  # fmt: skip


def _switching(manifest: Manifest, file: Path) -> list[float]:
    """Seconds from the name of an adapter, scaled as never before, to the inputs of the engines."""
    shelf = LoraShelf(manifest)
    shelf.load(file, "full")
    found = []
    for index in range(SWITCHES):
        start = time.perf_counter()
        shelf.active({"full": 1 + index / SWITCHES})
        found.append(time.perf_counter() - start)
    return found


def print_result(result: dict[str, Any]) -> None:
    """A line a way."""
    report.console.print(f"\n[bold]{result['variant']}[/bold] on {result['machine_text']}, {result['rounds']} rounds")
    for name, seconds in result["seconds_a_step"].items():
        ratio = result["step_against_without"].get(name, 1.0)
        error = result["latents_relative_l2"].get(name, 0.0)
        report.console.print(f"{name:<28}{1e3 * seconds:9.1f} ms a step  {ratio:6.3f} x   latents {error:.1e}")
    report.console.print(f"changing adapters: {result['switching_milliseconds']['median']:.1f} ms")
    report.print_bars(result["bars"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="onnxruntime fp32,openvino bf16", help="comma-separated")
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint than SANA's at mid size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where checkpoints and bundles are kept; in the cache by default")
    parser.add_argument("--results", type=Path, help="where the report goes; benchmarks/results by default")
    arguments = parser.parse_args(argv)
    work = work_folder(arguments.work)
    checkpoint = arguments.checkpoint or metacanvas_checkpoint(models.SIZES["mid"], work)
    results = []
    for variant in arguments.variants.split(","):
        results.append(measure(variant, checkpoint, work, arguments.rounds, arguments.steps, arguments.threads))
        print_result(results[-1])
    bars = [bar for result in results for bar in result["bars"]]
    found = {"benchmark": "lora", "rank": RANK, "variants": results, "bars": bars}
    report.save("lora", found, arguments.results)
    return found


if __name__ == "__main__":
    main()
