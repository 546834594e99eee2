"""Option types and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

TARGETS = ("onnxruntime", "openvino", "inductor", "inductor-cuda", "tensorrt", "tensorrt-rtx")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
COMPONENTS = ("vision", "planner", "text_encoder", "image_encoder", "step", "vae_decoder", "vae_encoder")

F = TypeVar("F", bound=Callable[..., Any])


class EngineChoice(NamedTuple):
    """Target and precision for one component of a bundle."""

    component: str
    target: str
    precision: str


if TYPE_CHECKING:
    SizeType = click.ParamType[tuple[int, int]]
    EngineType = click.ParamType[EngineChoice]
    TargetType = click.ParamType[tuple[str, str]]
    LoraType = click.ParamType[tuple[Path, float]]
else:  # generic only in the newest releases of click
    SizeType = EngineType = TargetType = LoraType = click.ParamType


class Size(SizeType):
    """`HEIGHTxWIDTH` in pixels -> (height, width). Whether the bundle serves it is the request's business."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `512x768`; anything but two whole numbers is a usage error."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(-?\d{1,18})[xX](-?\d{1,18})", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size: give height x width in pixels, like 512x768.", param, ctx)
        return int(match[1]), int(match[2])


class EngineOption(EngineType):
    """`COMPONENT=TARGET:PRECISION` -> `EngineChoice`."""

    name = "COMPONENT=TARGET:PRECISION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> EngineChoice:
        """Parse `step=openvino:int8`; unknown names are a usage error that lists the known ones."""
        if isinstance(value, EngineChoice):
            return value
        match = re.fullmatch(r"([a-z_]+)=([a-z-]+):([a-z0-9]+)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not COMPONENT=TARGET:PRECISION, like step=openvino:int8.", param, ctx)
        choice = EngineChoice(*match.groups())
        known_names = (COMPONENTS, TARGETS, PRECISIONS)
        for what, given, known in zip(EngineChoice._fields, choice, known_names, strict=True):
            if given not in known:
                self.fail(f"{given!r} is no {what}: take one of {', '.join(known)}.", param, ctx)
        return choice


class TargetOption(TargetType):
    """`TARGET` or `TARGET:PRECISION` -> the two; fp32 where no precision is said."""

    name = "TARGET[:PRECISION]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Parse `onnxruntime:int8`; unknown names are a usage error that lists the known ones."""
        if isinstance(value, tuple):
            return value
        target, _, precision = str(value).strip().partition(":")
        found = (target, precision or "fp32")
        for what, given, known in zip(("target", "precision"), found, (TARGETS, PRECISIONS), strict=True):
            if given not in known:
                self.fail(f"{given!r} is no {what}: take one of {', '.join(known)}.", param, ctx)
        return found


class Lora(LoraType):
    """`PATH` or `PATH:SCALE` -> (path, scale), the scale being 1 where none is said."""

    name = "PATH[:SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Path, float]:
        """Parse `style.safetensors:0.8`."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", str(value))
        return (Path(match[1]), float(match[2])) if match else (Path(str(value)), 1.0)


#: A path given as text; whether it can be read or written is found out, and said, by who does it.
FILE = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on standard output.")

bundle_argument = click.argument("bundle", metavar="BUNDLE", type=click.Path())


def debug_option(function: F) -> F:
    """Accept --debug on a command; `mc_runtime.cli.main` reads it when something fails."""
    help_text = "Show a traceback with an error."
    return click.option("--debug", is_flag=True, expose_value=False, help=help_text)(function)


def request_options(function: F) -> F:
    """What shapes one picture, as the keyword arguments steps, guidance, size, seed and threads."""
    chosen = (
        click.option("--steps", type=int, metavar="N", help="Denoising steps; the bundle's default if left out."),
        click.option("--guidance", type=float, metavar="SCALE", help="Guidance scale, 1 is none; the default is the bundle's."),
        click.option("--size", type=Size(), help="Height x width in pixels, like 512x768; the bundle's default if left out."),
        click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the first picture's noise."),
        click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; else the library's choice."),
    )
    for option in reversed(chosen):
        function = option(function)
    return function


def engine_options(function: F) -> F:
    """Where engines run, and which if the bundle's own do not run, as the keyword arguments device and fallback."""
    device = "Where to run: onnxruntime engines run on both; the others' target says where."
    fallback = "Run the bundle's engines of this target where its own do not run here; it has them if built with --fallback."
    function = click.option("--fallback", type=click.Choice(TARGETS), help=fallback)(function)
    return click.option("--device", type=click.Choice(("cpu", "cuda")), help=device)(function)


def media_options(function: F) -> F:
    """What a task is given beside the prompt, as the keyword arguments task, image, video, frames, fps and two of motion."""
    chosen = (
        click.option("--task", metavar="NAME", help="One of the bundle's tasks; guessed from what is given if left out."),
        click.option("--image", type=FILE, multiple=True, metavar="FILE", help="Input picture; again for another reference."),
        click.option("--video", type=FILE, metavar="PATH", help="Input video, or a folder of numbered frames."),
        click.option("--frames", type=int, metavar="N", help="Frames of a video; the bundle's default if left out."),
        click.option("--fps", type=float, metavar="RATE", help="Frames a second of a video; the bundle's default if left out."),
        click.option("--motion-bucket", type=int, metavar="N", help="How much moves, for a model that is told: 0 to 255."),
        click.option("--noise-augmentation", type=float, metavar="STD", help="Noise on the input picture, for such a model."),
    )
    for option in reversed(chosen):
        function = option(function)
    return function


def media_of(request: dict[str, Any]) -> dict[str, Any]:
    """The media arguments that were given, as `Runtime.generate` takes them."""
    names = ("image", "video", "frames", "fps", "motion_bucket", "noise_augmentation")
    given = {name: request[name] for name in names if request[name] not in (None, ())}
    return given | ({"image": list(given["image"])} if "image" in given else {})
