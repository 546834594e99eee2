"""`manifest.json`: the contract between the build and the runtime.

It names every engine's inputs and outputs with dtype and shape, every file with its sha256, and where the
bundle came from. An unknown key is an error, so that a manifest never says something the runtime silently
ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mc_runtime.bundle.abilities import Canvas, Frames, Guidance, Latents, Sampler, Sizes, Steps
from mc_runtime.bundle.checks import at_least_one
from mc_runtime.bundle.decode import DecodeError, decode, encode
from mc_runtime.bundle.engines import LORA_SUFFIX, STEPS, Engine, MeasuredError, Precision, Tensor
from mc_runtime.bundle.prompting import Prompting, PromptingSet, Segment
from mc_runtime.bundle.signatures import check_chunks, check_lora_engines, check_signature
from mc_runtime.bundle.step_cache import Calibrated, StepCache, check_cut_steps
from mc_runtime.errors import BundleError, printable

__all__ = [
    "ENCODED_SOURCES",
    "FORMAT",
    "MANIFEST_FILE",
    "VERSION",
    "Calibrated",
    "Canvas",
    "Checkpoint",
    "Component",
    "ConditionSource",
    "Engine",
    "Fallback",
    "File",
    "Frames",
    "Guidance",
    "Latents",
    "Machine",
    "Manifest",
    "MeasuredError",
    "Precision",
    "Prompting",
    "PromptingSet",
    "Sampler",
    "Segment",
    "Sizes",
    "StepCache",
    "Steps",
    "Tensor",
    "manifest_from_json",
    "manifest_to_json",
]

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
class Machine:
    """What the bundle needs: processor, system, and CPU features (`a|b` means either)."""

    arch: str
    os: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A second set of engines, for machines that cannot run the first, and what it needs of one."""

    engines: dict[Component, Engine]
    machine: Machine


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
    fallback: Fallback | None = None
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
    step_cache: StepCache | None = None
    machine: Machine
    versions: dict[str, str]
    quality: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least_one(max_batch=self.max_batch)
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
            check_signature(component, engine, self.conditions if component.removesuffix(LORA_SUFFIX) in STEPS else {})
        check_chunks(self.engines)
        check_cut_steps(self.engines, self.step_cache)
        check_lora_engines(self.engines)
        if (self.canvas is None) != (self.engines["step"].input("canvas") is None):
            raise ValueError("canvas: the step engine takes one where the manifest has none, or the other way round")
        given, taken = self.engines[self.conditioning].output("context"), self.engines["step"].input("context")
        if given is None or taken is None:
            raise ValueError(f"engines.{self.conditioning}.outputs: 'context' is missing")
        if given.shape[-1] != taken.shape[-1]:
            raise ValueError(
                f"engines.step.inputs: its 'context' is {taken.shape[-1]} wide, {self.conditioning!r} gives {given.shape[-1]}"
            )
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
        if self.fallback is not None:
            self._check_fallback()

    def _check_fallback(self) -> None:
        """Raise ValueError where the fallback's engines could not stand in for the bundle's own."""
        try:
            other = self.on_fallback()
        except ValueError as error:
            raise ValueError(f"fallback.{error}") from None
        for component in self.required_components():
            own, its = self.engines[component], other.engines[component]
            if (own.inputs, own.outputs) != (its.inputs, its.outputs):
                raise ValueError(f"fallback.engines.{component}: has other inputs or outputs than the bundle's own")

    def on_fallback(self) -> Manifest:
        """The manifest of the same bundle with the fallback's engines as its only ones."""
        assert self.fallback is not None
        return replace(self, engines=self.fallback.engines, machine=self.fallback.machine, fallback=None)

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
        fallback = self.fallback.engines if self.fallback else {}
        named = {file for engine in (*self.engines.values(), *fallback.values()) for file in engine.files}
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
        raise BundleError(f"{where}: {printable(str(error))}; {mend}") from None


def manifest_to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`: sorted keys, indent 2, a final newline."""
    return json.dumps(encode(manifest), sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def _is_plain(name: str) -> bool:
    """Whether a file name is a relative path in its plainest form, without `..`, control characters or backslashes."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and name == path.as_posix() and name.isprintable() and "\\" not in name and name != MANIFEST_FILE


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
