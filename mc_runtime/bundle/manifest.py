"""`manifest.json`: the contract between the build and the runtime.

It names every engine's inputs and outputs with dtype and shape, every file with its sha256, and where the
bundle came from. An unknown key is an error, so that a manifest never says something the runtime silently
ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mc_runtime.bundle.decode import DecodeError, decode, encode
from mc_runtime.bundle.signatures import check_chunks, check_signature
from mc_runtime.bundle.vision import Vision
from mc_runtime.errors import BundleError

FORMAT = "mc-runtime-bundle"
VERSION = 1
MANIFEST_FILE = "manifest.json"

Component = str
"""`vision`, `planner`, `text_encoder`, `step`, `vae_decoder`, `vae_encoder`; a later task may add names."""


ConditionSource = Literal[
    "pooled", "guidance_scale", "size_ids", "motion_ids", "image_latents", "reference_latents", "has_reference",
    "reference_frames", "reference_mask", "first_frame", "has_first_frame", "condition_latents", "condition_mask",
]  # fmt: skip
"""What a further input of the step engine is filled with; docs/bundle.md has the table."""


ENCODED_SOURCES: frozenset[ConditionSource] = frozenset(
    ("image_latents", "reference_latents", "reference_frames", "first_frame", "condition_latents")
)


class Precision(StrEnum):
    """What an engine computes in; its inputs and outputs stay float32 and int64."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One engine input or output; a string dimension is dynamic: a name, equal ones equal sizes, or a multiple, `8*H`."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, int) and size < 1:
                raise ValueError(f"shape: expected sizes of at least 1, found {size}")


@dataclass(frozen=True, kw_only=True)
class MeasuredError:
    """An engine against its torch module, over the shapes it was run at (each a map of dimension to size)."""

    max_abs: float
    relative_l2: float
    shapes: tuple[dict[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One component: the library that runs it, its files (the first is the one to load) and its signature."""

    target: str
    precision: Precision
    files: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    error: MeasuredError | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files: an engine has at least one file")

    def input(self, name: str) -> Tensor | None:
        """The input of that name, or None where this engine takes none."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def output(self, name: str) -> Tensor | None:
        """The output of that name, or None where this engine gives none."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the bundle, named by its path inside it."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise ValueError("sha256: expected 64 hexadecimal digits")
        if self.bytes < 0:
            raise ValueError("bytes: expected a size")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What the bundle was built from."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents' `channels`; along height and width, pixels per cell and cells per token; pixel `frames` per latent frame."""

    channels: int
    scale: int
    patch: int
    frames: int = 1

    def __post_init__(self) -> None:
        _at_least_one(channels=self.channels, scale=self.scale, patch=self.patch, frames=self.frames)


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Pixel frames of a video, `first + k * multiple`, and frames a second when the request names none."""

    default: int
    multiple: int
    first: int
    max: int
    fps: float

    def __post_init__(self) -> None:
        _at_least_one(default=self.default, multiple=self.multiple, first=self.first, max=self.max)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps: expected more than 0 and at most 1000, found {self.fps:g}")
        if not self.serves(self.default):
            raise ValueError(f"default: {self.default} is none of {self.first} + k * {self.multiple} up to {self.max}")

    def serves(self, count: int) -> bool:
        """Whether a video of `count` frames can be made."""
        return self.first <= count <= self.max and (count - self.first) % self.multiple == 0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes, (height, width) in pixels; `served` lists the only ones, where the engines have fixed shapes."""

    default: tuple[int, int]
    served: tuple[tuple[int, int], ...] | None = None
    multiple: int
    min: int
    max: int

    def __post_init__(self) -> None:
        _at_least_one(multiple=self.multiple, min=self.min, max=self.max)
        if self.served is not None and self.default not in self.served:
            raise ValueError("default: is none of the served sizes")
        for size in (self.default, *(self.served or ())):
            if not all(side % self.multiple == 0 and self.min <= side <= self.max for side in size):
                raise ValueError(f"{list(size)}: sides must be multiples of {self.multiple} from {self.min} to {self.max}")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Default scale, and how many branches the step engine weighs.

    `embedded`: the model takes the scale as an input. `ramp_from`: the scale of a video's first frame, which rises to the
    request's at its last. With one branch and neither, the model takes no guidance. `zero_negative`: zeros stand for the
    states of an empty negative prompt.
    """

    default: float
    branches: int
    embedded: bool = False
    ramp_from: float | None = None
    zero_negative: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.branches <= 3:
            raise ValueError(f"branches: expected 1, 2 or 3, found {self.branches}")
        if self.default < 0:
            raise ValueError(f"default: expected 0 or more, found {self.default:g}")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Denoising steps when the request names none, and the most the sampler table holds."""

    default: int
    max: int

    def __post_init__(self) -> None:
        _at_least_one(default=self.default, max=self.max)
        if self.default > self.max:
            raise ValueError(f"default: {self.default} is more than max, {self.max}")


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The table of linear multistep coefficients and the diffusers scheduler it was taken from."""

    file: str
    scheduler: str
    order: int
    dynamic_shift: bool

    def __post_init__(self) -> None:
        _at_least_one(order=self.order)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Canvas tokens: the (t, h, w) grid, which follows the picture's size where `pixels_per_token` is set."""

    grid: tuple[int, int, int]
    pixels_per_token: int | None = None
    keyframes: int = 1

    def __post_init__(self) -> None:
        sides = dict(zip("thw", self.grid, strict=True))
        _at_least_one(keyframes=self.keyframes, pixels_per_token=self.pixels_per_token or 1, **sides)

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The (t, h, w) grid for a picture of (height, width) pixels."""
        if self.pixels_per_token is None:
            return self.grid
        height, width = (-(-side // self.pixels_per_token) for side in size)
        return (self.grid[0], height, width)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the prompt's frame: fixed text, or the slot of the prompt, or that of its pictures and clips."""

    text: str | None = None
    slot: Literal["prompt", "media"] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.slot is None):
            raise ValueError("a segment has either text or a slot")


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How a prompt becomes token ids for one engine.

    `negative_segments` frames the negative prompt where it differs. `max_tokens` counts the frame too, but not the
    tokens of pictures and clips; `vision` says how those are read, where they are. `select` are the rows of the
    padded sequence that the text encoder keeps (negative ones count from the end), as SANA does after its
    instruction. `gives_context` is off for an encoder that gives a pooled vector only; `padding_counts` is on where
    the backbone reads the padded rows too, as it was trained to; without `pad_to_max`, one of them stands for all,
    because they are equal.
    """

    tokenizer: str
    segments: tuple[Segment, ...]
    negative_segments: tuple[Segment, ...] | None = None
    normalize: Literal["none", "lower_strip", "clean"] = "none"
    max_tokens: int
    negative_max_tokens: int | None = None
    truncate: bool
    pad_id: int
    pad_to_max: bool = False
    end_token_id: int | None = None
    select: tuple[int, ...] | None = None
    gives_context: bool = True
    padding_counts: bool = False
    vision: Vision | None = None

    def __post_init__(self) -> None:
        _at_least_one(max_tokens=self.max_tokens, negative_max_tokens=self.negative_max_tokens or 1)
        if self.pad_id < 0 or (self.end_token_id or 0) < 0:
            raise ValueError("pad_id, end_token_id: expected 0 or more")
        if any(not -self.max_tokens <= row < self.max_tokens for row in self.select or ()):
            raise ValueError(f"select: expected rows from {-self.max_tokens} to {self.max_tokens - 1}")
        for segments in (self.segments, self.negative_segments or self.segments):
            if (self.vision is None) != all(segment.slot != "media" for segment in segments):
                raise ValueError("segments: a slot for media belongs to a prompting with vision, and to no other")


@dataclass(frozen=True, kw_only=True)
class PromptingSet:
    """The prompting of each model that reads text; the `text_encoder` engine holds up to two."""

    planner: Prompting | None = None
    text_encoder: Prompting | None = None
    text_encoder_2: Prompting | None = None

    @property
    def all(self) -> tuple[Prompting, ...]:
        """Those that there are."""
        return tuple(spec for spec in (self.planner, self.text_encoder, self.text_encoder_2) if spec)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the bundle needs: processor, system, and CPU features (`a|b` means either)."""

    arch: str
    os: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`; see docs/bundle.md."""

    format: str = FORMAT
    version: int = VERSION
    name: str
    created: str
    checkpoint: Checkpoint
    backbone: str
    tasks: tuple[str, ...]
    conditioning: Literal["planner", "text_encoder", "image_encoder"]
    stock: bool
    engines: dict[Component, Engine]
    files: dict[str, File]
    latents: Latents
    sizes: Sizes
    max_batch: int
    guidance: Guidance
    steps: Steps
    sampler: Sampler
    frames: Frames | None = None
    conditions: dict[str, ConditionSource] = field(default_factory=dict)
    reference_sizes: tuple[tuple[int, int], ...] = ()
    canvas: Canvas | None = None
    prompting: PromptingSet
    empty_plan: str | None = None
    machine: Machine
    versions: dict[str, str]
    quality: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one(max_batch=self.max_batch)
        for name in self.files:
            if not _is_plain(name):
                raise ValueError(f"files: {name!r} is not a plain path inside the bundle")
        for name in sorted(self.referenced_files()):
            if name not in self.files:
                raise ValueError(f"files: {name!r} is used but not listed with its sha256")
        for component in self.required_components():
            if component not in self.engines:
                raise ValueError(f"engines: {component!r} is missing")
        for component, engine in self.engines.items():
            check_signature(component, engine, self.conditions if component == "step" else {})
        check_chunks(self.engines)
        if (self.canvas is None) != (self.engines["step"].input("canvas") is None):
            raise ValueError("canvas: the step engine takes one where the manifest has none, or the other way round")
        if self.engines[self.conditioning].output("context") is None:
            raise ValueError(f"engines.{self.conditioning}.outputs: 'context' is missing")
        if self.sizes.multiple % (self.latents.scale * self.latents.patch):
            raise ValueError("sizes.multiple: is no multiple of latents.scale * latents.patch")
        if self.conditioning != "image_encoder" and getattr(self.prompting, self.conditioning) is None:
            raise ValueError(f"prompting: {self.conditioning!r} gives the context and has no prompting")
        if self.canvas is not None and self.prompting.planner is None:
            raise ValueError("prompting: 'planner' draws the canvas and has no prompting")
        reads = self.prompting.planner is not None and self.prompting.planner.vision is not None
        takes = "planner" in self.engines and self.engines["planner"].input("vision") is not None
        if len({reads, takes, "vision" in self.engines}) > 1:
            raise ValueError("prompting.planner.vision: belongs with a vision engine and a planner engine that takes its rows")

    @property
    def encodes_media(self) -> bool:
        """Whether the step engine is told of encoded pictures or clips."""
        return bool(ENCODED_SOURCES & set(self.conditions.values()))

    def required_components(self) -> tuple[Component, ...]:
        """The engines that a request needs, in its order; `vision` and `vae_encoder` where there are pictures to see."""
        vision = ("vision",) if "vision" in self.engines else ()
        planner = self.canvas is not None or self.conditioning == "planner"
        reader = self.conditioning if self.conditioning != "planner" else None
        text = (*(["planner"] if planner else []), *([reader] if reader else []))
        encoder = ("vae_encoder",) if self.encodes_media else ()
        following = tuple(f"{name}_next" for name in (*encoder, "vae_decoder") if f"{name}_next" in self.engines)
        return (*vision, *text, *encoder, "step", "vae_decoder", *following)

    def referenced_files(self) -> set[str]:
        """Every file that another field of the manifest names."""
        named = {file for engine in self.engines.values() for file in engine.files}
        named |= {self.sampler.file}
        named |= {spec.tokenizer for spec in self.prompting.all}
        return named | ({self.empty_plan} if self.empty_plan else set())


def manifest_from_json(text: str | bytes, where: str | Path) -> Manifest:
    """Parse and validate a manifest; `where` is the file named in the error.

    Raises BundleError in one line: not JSON, not a bundle, another version, or the first field that is wrong.
    """
    mend = "build the bundle again with `mc-runtime build`"
    try:
        raw = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); {mend}") from None
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
        raise BundleError(f"{where}: not an mc-runtime bundle (format is not {FORMAT!r}); {mend}")
    if raw.get("version") != VERSION:
        raise BundleError(f"{where}: bundle version {raw.get('version')!r}, this mc-runtime reads version {VERSION}; {mend}")
    try:
        return decode(Manifest, raw)
    except DecodeError as error:
        raise BundleError(f"{where}: {error}; {mend}") from None


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`: sorted keys, indent 2, a final newline."""
    return json.dumps(encode(manifest), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")


def _is_plain(name: str) -> bool:
    """Whether a file name is a relative path in its plainest form, without `..`, control characters or backslashes."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and name == path.as_posix() and name.isprintable() and "\\" not in name and name != MANIFEST_FILE


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
