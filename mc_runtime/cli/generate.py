"""`mc-runtime generate`: one prompt, one or more pictures or videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_runtime import __version__
from mc_runtime.cache import compiled_cache
from mc_runtime.cli import options
from mc_runtime.cli.demo import bundle_path
from mc_runtime.cli.output import print_json, progress_bar, seconds
from mc_runtime.cli.outputs import Outputs, check_output, results_of, write_outputs
from mc_runtime.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

    from mc_runtime.bundle.store import Bundle
    from mc_runtime.media.clip import Clip
    from mc_runtime.runtime.result import Result, Step


@click.command("generate")
@options.bundle_argument
@click.argument("prompt", default="")
@click.option(
    "-o", "--output", type=options.FILE, metavar="FILE",
    help="Picture (.png, .jpg, .webp) or video (.mp4, .webm, .gif, .webp, or a folder of frames) to write; out.png or out.mp4 "
    "if left out. With --num-images N: out-0.png, out-1.png and so on.",
)  # fmt: skip
@click.option("--negative-prompt", default="", metavar="TEXT", help="What the picture should not show.")
@click.option(
    "--true-cfg", type=float, metavar="SCALE",
    help="Scale of the negative prompt, where the model takes the guidance scale itself (FLUX); 1 is off.",
)  # fmt: skip
@options.media_options
@options.request_options
@options.engine_options
@click.option(
    "-n", "--num-images", type=int, default=1, show_default=True, metavar="N",
    help="How many pictures, or videos, of the prompt; each has the seed after the one before.",
)  # fmt: skip
@click.option(
    "--lora", "loras", type=options.Lora(), multiple=True,
    help="A LoRA's file or folder, and its scale; may be given again. The bundle must be built with --lora-rank.",
)  # fmt: skip
@click.option(
    "--cache", is_flag=True,
    help="Keep the backbone's residual between steps that change little, by the bundle's calibrated threshold: faster, at a "
    "small loss. The bundle must be built with --cache.",
)  # fmt: skip
@click.option("--cache-threshold", type=float, metavar="CHANGE", help="The same by another threshold; 0 keeps nothing.")
@click.option("--canvas-map", type=options.FILE, metavar="FILE", help="Also write the layout the planner drew.")
@click.option("--sheet", type=options.FILE, metavar="FILE", help="Also write all results side by side.")
@click.option("--comparison", type=options.FILE, metavar="FILE", help="Also write the input beside the result, as a clip.")
@click.option("--no-metadata", is_flag=True, help="Write no prompt, seed or version into the files.")
@options.json_option
@options.debug_option
def command(
    bundle: str,
    prompt: str,
    output: Path | None,
    negative_prompt: str,
    true_cfg: float | None,
    num_images: int,
    loras: tuple[tuple[Path, float], ...],
    cache: bool,
    cache_threshold: float | None,
    canvas_map: Path | None,
    sheet: Path | None,
    comparison: Path | None,
    no_metadata: bool,
    as_json: bool,
    **request: Any,
) -> None:
    """Make pictures or videos of PROMPT with the engines of BUNDLE (a directory, or the name of a demo).

    The same seed on the same bundle gives the same bytes, alone or beside others. What is made depends on the bundle and on
    what it is given: a prompt alone, --image, or --video; `mc-runtime inspect` lists a bundle's tasks.

    \b
    Examples:
      mc-runtime generate demo "a red circle left of a blue square" -o out.png
      mc-runtime generate ./bundle "two green triangles" -o out.png --canvas-map canvas.png
      mc-runtime generate ./bundle "a yellow star" -o star.webp -n 4 --seed 7 --sheet sheet.png
      mc-runtime generate ./bundle "a lake" --negative-prompt "boats" --steps 20 --guidance 4.5 --size 512x768
      mc-runtime generate ./bundle "make it night" --image day.jpg -o night.png --comparison both.gif
      mc-runtime generate ./bundle "a boat sails away" --frames 49 --fps 24 -o boat.mp4
      mc-runtime generate ./bundle "a lake" --lora ./watercolour.safetensors:0.8 -o lake.png
      mc-runtime generate ./bundle "a lake" --cache -o lake.png
      mc-runtime generate ./bundle "a lake" --json | jq .timings
      mc-runtime generate ./bundle "a secret" -o out.png --no-metadata
    """
    if output is not None:
        # What can be known before the bundle is opened; its task then says whether this is a picture's name or a clip's.
        results = results_of(output, num_images)
        for path in results:
            check_either(path)
    path = bundle_path(bundle, quiet=as_json)
    from mc_runtime.runtime.runtime import Runtime
    from mc_runtime.tasks.registry import task_for

    runtime = Runtime.load(
        path, threads=request["threads"], device=request["device"], cache_dir=compiled_cache(), fallback=request["fallback"]
    )
    if runtime.fell_back is not None:
        click.echo(f"running the bundle's {request['fallback']} engines: {runtime.fell_back}", err=True)
    manifest = runtime.manifest
    scales = {runtime.load_lora(file, f"{index}: {file.name}"): scale for index, (file, scale) in enumerate(loras)}
    if canvas_map is not None and manifest.canvas is None:
        raise RequestError(f"{bundle}: a stock pipeline draws no canvas; leave --canvas-map out")
    media = options.media_of(request)
    if comparison is not None and not media.keys() & {"image", "video"}:
        raise RequestError("--comparison shows an input beside the result; give --image or --video, or leave it out")
    task_for(manifest.tasks, request["task"], media)
    name = output or Path("out.mp4" if manifest.frames else "out.png")
    results = results_of(name, num_images)
    outputs = Outputs(results, canvas_map, sheet, comparison, manifest.frames is not None, manifest.tasks)
    outputs.check()
    with progress_bar("drawing", quiet=as_json) as progress:

        def on_step(step: Step) -> None:
            progress(step.index + 1, step.total)

        result = runtime.generate(
            prompt,
            task=request["task"],
            negative_prompt=negative_prompt,
            num_images=num_images,
            steps=request["steps"],
            guidance_scale=request["guidance"],
            true_cfg_scale=true_cfg,
            size=request["size"],
            seed=request["seed"],
            lora=scales,
            cache=cache if cache_threshold is None else cache_threshold,
            on_step=on_step,
            **media,
        )
    story = _story(runtime.bundle, prompt, negative_prompt, result, {**request, "true_cfg": true_cfg})
    if loras:
        story["lora"] = _adapters(loras)
    if cache or cache_threshold is not None:
        listed = manifest.step_cache.threshold if manifest.step_cache else None
        story["cache"] = listed if cache_threshold is None else cache_threshold
    write_outputs(result, outputs, None if no_metadata else story, _input_of(media) if comparison else None)
    if as_json:
        print_json(_report(path, story, result, outputs))
        return
    for written in outputs.all:
        click.echo(written)
    took = seconds(result.timings["total"])
    height, width = _size(result)
    frames = f" x {len(result.clips[0])} frames" if result.clips else ""
    click.echo(f"{len(result.seeds)} x {height}x{width} pixels{frames} in {took}", err=True)


def check_either(path: Path) -> None:
    """Whether a picture or a clip can be written at `path`. Raises OutputError."""
    from mc_runtime.media.clip_output import CLIP_FORMATS

    check_output(path, clip=not path.suffix or path.suffix.lower() in CLIP_FORMATS)


def _adapters(loras: Sequence[tuple[Path, float]]) -> dict[str, float]:
    """Scales by the files' names, each behind as many of its folders as it takes to tell one file from another."""
    scales: dict[Path, float] = {}
    for file, scale in loras:
        place = file.absolute()
        scales[place] = scales.get(place, 0.0) + scale
    count, names = 1, [place.name for place in scales]
    while len(set(names)) < len(names):
        count += 1
        names = [Path(*place.parts[-count:]).as_posix() for place in scales]
    return dict(zip(names, scales.values(), strict=True))


def _input_of(media: dict[str, Any]) -> Image.Image | Clip:
    """The input picture or clip that a comparison shows; an animated file is what it was given as."""
    from mc_runtime.media.clip_input import load_clip
    from mc_runtime.media.image_input import load_image

    return load_image(media["image"][0]) if "image" in media else load_clip(media["video"])


def _size(result: Result) -> tuple[int, int]:
    """(height, width) of the results in pixels."""
    if result.clips:
        return result.clips[0].size
    return result.images[0].height, result.images[0].width


def _story(bundle: Bundle, prompt: str, negative_prompt: str, result: Result, request: dict[str, Any]) -> dict[str, Any]:
    """How the pictures were made, enough to make them again with the same bundle."""
    from mc_runtime.backends.registry import available

    manifest = bundle.manifest
    libraries = available()
    targets = sorted({engine.target for engine in manifest.engines.values()})
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": manifest.steps.default if request["steps"] is None else request["steps"],
        "guidance": manifest.guidance.default if request["guidance"] is None else request["guidance"],
        **({"true_cfg": request["true_cfg"]} if request["true_cfg"] is not None else {}),
        "task": result.plan.task,
        "size": list(_size(result)),
        "bundle": manifest.name,
        "bundle_sha256": bundle.digest,
        "checkpoint": manifest.checkpoint.sha256,
        "versions": {"mc_runtime": __version__, **{name: libraries[name]["version"] for name in targets}},
    }


def _report(bundle: Path, story: dict[str, Any], result: Result, outputs: Outputs) -> dict[str, Any]:
    return {
        **story,
        "bundle": str(bundle),
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(outputs.results, result.seeds, strict=True)],
        **({"computed_steps": list(result.computed_steps)} if "cache" in story else {}),
        "canvas_map": None if outputs.canvas_map is None else str(outputs.canvas_map),
        "sheet": None if outputs.sheet is None else str(outputs.sheet),
        "comparison": None if outputs.comparison is None else str(outputs.comparison),
        "timings": result.timings,
    }
