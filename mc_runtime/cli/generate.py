"""`mc-runtime generate`: one prompt, one or more pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mc_runtime import __version__
from mc_runtime.cache import compiled_cache
from mc_runtime.cli import options
from mc_runtime.cli.demo import bundle_path
from mc_runtime.cli.output import print_json, progress_bar, seconds
from mc_runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    from mc_runtime.bundle.store import Bundle
    from mc_runtime.runtime.result import Result, Step


@dataclass(frozen=True)
class Outputs:
    """Where the pictures of one request go."""

    images: tuple[Path, ...]
    canvas_map: Path | None = None
    sheet: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file that will be written."""
        return (*self.images, *(path for path in (self.canvas_map, self.sheet) if path is not None))


@click.command("generate")
@options.bundle_argument
@click.argument("prompt")
@click.option(
    "-o", "--output", type=options.FILE, default=Path("out.png"), show_default=True, metavar="FILE",
    help="Picture to write: .png, .jpg or .webp. With --num-images N: out-0.png, out-1.png and so on.",
)  # fmt: skip
@click.option("--negative-prompt", default="", metavar="TEXT", help="What the picture should not show.")
@options.request_options
@click.option(
    "-n", "--num-images", type=int, default=1, show_default=True, metavar="N",
    help="How many pictures of the prompt; each has the seed after the one before.",
)  # fmt: skip
@click.option("--canvas-map", type=options.FILE, metavar="FILE", help="Also write the layout the planner drew.")
@click.option("--sheet", type=options.FILE, metavar="FILE", help="Also write all pictures side by side.")
@click.option("--no-metadata", is_flag=True, help="Write no prompt, seed or version into the files.")
@options.json_option
@options.debug_option
def command(
    bundle: str,
    prompt: str,
    output: Path,
    negative_prompt: str,
    num_images: int,
    canvas_map: Path | None,
    sheet: Path | None,
    no_metadata: bool,
    as_json: bool,
    **request: Any,
) -> None:
    """Make pictures of PROMPT with the engines of BUNDLE (a directory, or `demo`).

    The same seed on the same bundle gives the same bytes, alone or beside others.

    \b
    Examples:
      mc-runtime generate demo "a red circle left of a blue square" -o out.png
      mc-runtime generate ./bundle "two green triangles" -o out.png --canvas-map canvas.png
      mc-runtime generate ./bundle "a yellow star" -o star.webp -n 4 --seed 7 --sheet sheet.png
      mc-runtime generate ./bundle "a lake" --negative-prompt "boats" --steps 20 --guidance 4.5 --size 512x768
      mc-runtime generate ./bundle "a lake" --json | jq .timings
      mc-runtime generate ./bundle "a secret" -o out.png --no-metadata
    """
    outputs = plan_outputs(output, num_images, canvas_map, sheet)
    path = bundle_path(bundle, quiet=as_json)
    from mc_runtime.runtime.runtime import Runtime

    runtime = Runtime.load(path, threads=request["threads"], cache_dir=compiled_cache())
    if canvas_map is not None and runtime.manifest.canvas is None:
        raise RequestError(f"{bundle}: a stock pipeline draws no canvas; leave --canvas-map out")
    with progress_bar("drawing", quiet=as_json) as progress:

        def on_step(step: Step) -> None:
            progress(step.index + 1, step.total)

        result = runtime.generate(
            prompt,
            negative_prompt=negative_prompt,
            num_images=num_images,
            steps=request["steps"],
            guidance_scale=request["guidance"],
            size=request["size"],
            seed=request["seed"],
            on_step=on_step,
        )
    story = _story(runtime.bundle, prompt, negative_prompt, result, request)
    write_outputs(result, outputs, None if no_metadata else story)
    if as_json:
        print_json(_report(path, story, result, outputs))
        return
    for written in outputs.all:
        click.echo(written)
    first = result.images[0]
    took = seconds(result.timings["total"])
    click.echo(f"{len(result.images)} x {first.height}x{first.width} pixels in {took}", err=True)


def plan_outputs(output: Path, num_images: int = 1, canvas_map: Path | None = None, sheet: Path | None = None) -> Outputs:
    """Names of the files to write, each checked before any work is done. Raises OutputError."""
    from mc_runtime.tasks.checks import MAX_IMAGES

    if not 1 <= num_images <= MAX_IMAGES:
        raise RequestError(f"num_images must be a whole number from 1 to {MAX_IMAGES}, got {num_images}")
    images: tuple[Path, ...] = (output,)
    if num_images > 1:
        images = tuple(output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(num_images))
    outputs = Outputs(images, canvas_map, sheet)
    if len(set(outputs.all)) != len(outputs.all):
        raise OutputError(f"{output}: two outputs have the same name; give --canvas-map and --sheet names of their own")
    for path in outputs.all:
        check_output(path)
    return outputs


def check_output(path: Path) -> None:
    """Whether a picture can be written at `path`: its suffix, its directory, and no directory of that name."""
    from mc_runtime.media.images import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise OutputError(f"{path}: no picture format that is known; end the name in one of {', '.join(FORMATS)}")
    try:
        if path.is_dir():
            raise OutputError(f"{path}: is a directory; name a file in it")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no directory {path.parent}; make it first")
        # A picture is written beside its place and moved there: its directory must take new files in any case.
        places = (path.parent, path) if path.exists() else (path.parent,)
    except OSError as error:  # the name is too long
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another name") from None
    if not all(os.access(place, os.W_OK) for place in places):
        raise OutputError(f"{path}: not writable; choose another place or change its permissions")


def write_outputs(result: Result, outputs: Outputs, story: dict[str, Any] | None) -> None:
    """Write every picture, each with `story` and its own seed inside, or with nothing. Raises OutputError."""
    from mc_runtime.media.images import save_image

    for image, seed, path in zip(result.images, result.seeds, outputs.images, strict=True):
        save_image(image, path, None if story is None else {**story, "seed": seed})
    if outputs.canvas_map is not None:
        save_image(result.plan.canvas_map(), outputs.canvas_map, story)
    if outputs.sheet is not None:
        from mc_runtime.media.sheet import contact_sheet

        captions = [f"seed {seed}" for seed in result.seeds]
        save_image(contact_sheet(result.images, captions), outputs.sheet, story)


def _story(
    bundle: Bundle, prompt: str, negative_prompt: str, result: Result, request: dict[str, Any]
) -> dict[str, Any]:
    """How the pictures were made, enough to make them again with the same bundle."""
    from mc_runtime.backends.registry import available

    manifest = bundle.manifest
    libraries = available()
    targets = sorted({engine.target for engine in manifest.engines.values()})
    first = result.images[0]
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": manifest.steps.default if request["steps"] is None else request["steps"],
        "guidance": manifest.guidance.default if request["guidance"] is None else request["guidance"],
        "size": [first.height, first.width],
        "bundle": manifest.name,
        "bundle_sha256": bundle.digest,
        "checkpoint": manifest.checkpoint.sha256,
        "versions": {"mc_runtime": __version__, **{name: libraries[name]["version"] for name in targets}},
    }


def _report(bundle: Path, story: dict[str, Any], result: Result, outputs: Outputs) -> dict[str, Any]:
    return {
        **story,
        "bundle": str(bundle),
        "images": [{"path": str(path), "seed": seed} for path, seed in zip(outputs.images, result.seeds, strict=True)],
        "canvas_map": None if outputs.canvas_map is None else str(outputs.canvas_map),
        "sheet": None if outputs.sheet is None else str(outputs.sheet),
        "timings": result.timings,
    }
