"""Draws with optimum-onnx's `ORTSanaPipeline` when asked on standard input; run by that environment's own interpreter.

    python optimum_worker.py '{"checkpoint": ..., "engines": ..., "folder": ..., "prompt": ..., ...}'

Exports the checkpoint to `engines` at first use. Answers are JSON objects, one a line: first the versions, then one for every
line read, `picture` (writes latents.npy and pixels.npy to `folder`) or `draw` (seconds per stage).
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from optimum.onnxruntime.modeling_diffusion import ORTSanaPipeline  # type: ignore[import-not-found]  # in its own environment

LIBRARIES = ("optimum-onnx", "optimum", "transformers", "diffusers", "onnxruntime", "torch")


def main() -> None:
    """Load, then answer."""
    task = json.loads(sys.argv[1])
    pipeline = load(Path(task["checkpoint"]), Path(task["engines"]), task["threads"])
    seconds = clocked(pipeline)
    folder = Path(task["folder"])
    arguments: dict[str, Any] = {
        "prompt": task["prompt"], "num_inference_steps": task["steps"], "guidance_scale": task["guidance"],
        "height": task["height"], "width": task["width"], "latents": torch.from_numpy(np.load(folder / "noise.npy")),
        # the checkpoint's own size, not the nearest of the published checkpoint's training sizes
        "use_resolution_binning": False,
    }  # fmt: skip
    answer({name: version(name) for name in LIBRARIES})
    for line in sys.stdin:
        if line.strip() == "picture":
            latents = pipeline(**arguments, output_type="latent").images
            picture = pipeline(**arguments).images[0]
            np.save(folder / "latents.npy", latents.numpy())
            np.save(folder / "pixels.npy", np.asarray(picture))
            answer({})
        else:
            seconds.clear()
            start = time.perf_counter()
            pipeline(**arguments)
            total = time.perf_counter() - start
            found = {"plan": seconds["plan"], "decode": seconds["decode"]}
            answer({**found, "denoise": total - sum(found.values())})


def load(checkpoint: Path, engines: Path, threads: int) -> Any:
    """The pipeline, each of its sessions with `threads` threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    torch.set_num_threads(threads)
    if not (engines / "model_index.json").is_file():
        ORTSanaPipeline.from_pretrained(str(checkpoint), export=True).save_pretrained(str(engines))
    pipeline = ORTSanaPipeline.from_pretrained(str(engines), provider="CPUExecutionProvider", session_options=options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clocked(pipeline: Any) -> dict[str, float]:
    """Seconds in the text encoder and in the decoder, counted from now on."""
    seconds: dict[str, float] = {}
    for stage, part, name in (("plan", pipeline, "encode_prompt"), ("decode", pipeline.vae, "decode")):
        setattr(part, name, timed(getattr(part, name), stage, seconds))
    return seconds


def timed(function: Any, stage: str, seconds: dict[str, float]) -> Any:
    """`function`, adding its time to `seconds[stage]`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    return wrapper


def answer(found: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
