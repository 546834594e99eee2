"""The engines a checkpoint needs: what each is made of, and how far its dimensions reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from mc_export.autoencoders.base import Reach
from mc_export.build.options import BuildOptions
from mc_export.checkpoint import layout
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.hashing import sha256_of_files
from mc_export.lora import AdaptedProgram
from mc_export.model.config import METACANVAS_FILE
from mc_export.program.base import Program
from mc_export.program.cut_step import FirstStepProgram, RestStepProgram
from mc_export.program.image_encoder import ImageEncoderProgram
from mc_export.program.planner import PlannerProgram
from mc_export.program.step import StepProgram
from mc_export.program.text_encoder import TextEncoderProgram
from mc_export.program.vision import VisionProgram
from mc_runtime.bundle.engines import LORA_SUFFIX, STEP, STEP_FIRST, STEP_REST, STEPS
from mc_runtime.bundle.manifest import ENCODED_SOURCES, Component, Frames, PromptingSet, Sizes
from mc_runtime.errors import CheckpointError, RequestError

# Without --size, pictures up to this many times the checkpoint's own side are served, and never less than a side of 64 tokens.
_LARGEST = 4
# And videos of up to this many times the backbone's own frames.
_LONGEST = 2
_LEAST_LARGEST = 64
# One token is a size the exporter would take for a constant.
_SMALLEST = 2
# Targets whose kernels put merged projections in the place of single layers.
_WITHOUT_LORA = frozenset({"inductor-cuda"})


@dataclass(frozen=True)
class Limits:
    """How far the dynamic dimensions of a bundle's engines reach.

    Attributes:
        max_batch: images at once.
        max_tokens: multiples that sizes have, along the longer side of a picture: tokens, or several of them.
        max_canvas: canvas tokens along it; 1 without a canvas.
        planner_length, text_lengths: longest sequences, pictures included, one a text encoder; 0 and none where there is no
            such engine.
        vision_tokens: most tokens of pictures and clips in one; 0 where the planner reads text only.
        max_frames: latent frames of a video; 1 for pictures.
        context_length: most rows of context.
        order: of the sampler.
    """

    max_batch: int
    max_tokens: int
    max_canvas: int
    planner_length: int
    text_lengths: tuple[int, ...]
    context_length: int
    order: int
    max_frames: int = 1
    vision_tokens: int = 0


@dataclass(frozen=True)
class Part:
    """One engine to build.

    Attributes:
        component: its name.
        sources: folders and files of the checkpoint it is made of.
        make: loads them into the engine's program.
        lora_rank: of the adapters it takes; 0 where it takes none.
    """

    component: Component
    sources: tuple[str, ...]
    make: Callable[[], Program]
    lora_rank: int = 0


def sizes_of(checkpoint: Checkpoint, options: BuildOptions) -> Sizes:
    """The sizes a bundle of this checkpoint serves.

    Raises:
        RequestError: a size asked for is too small, too large or no multiple of the latent grid; the message says the nearest
            that is served.
        CheckpointError: the checkpoint's own size is.
    """
    config = checkpoint.model_config
    scale = checkpoint.pixels_per_latent
    cells = checkpoint.backbone.size_multiple(config)
    multiple = scale * cells
    rows, columns = checkpoint.default_latent_size
    native = (rows * scale, columns * scale)
    if rows % cells or columns % cells or min(rows, columns) < _SMALLEST * cells:
        raise CheckpointError(
            f"{checkpoint.path}/{checkpoint.backbone.component}/config.json: made for {rows} x {columns} latent cells; "
            f"sides must be multiples of {cells} from {_SMALLEST * cells} on"
        )
    smallest, largest = _SMALLEST * multiple, max(_LARGEST * max(native), _LEAST_LARGEST * multiple)
    for height, width in options.sizes:
        if height % multiple or width % multiple or not smallest <= min(height, width) <= max(height, width) <= largest:
            served_sides = (min(max(smallest, round(side / multiple) * multiple), largest) for side in (height, width))
            raise RequestError(
                f"size {height}x{width}: sides must be multiples of {multiple} from {smallest} to {largest}; "
                f"the nearest is {'x'.join(map(str, served_sides))}"
            )
    served = tuple(dict.fromkeys(options.sizes)) or None
    return Sizes(
        default=native if served is None or native in served else served[0],
        served=served,
        multiple=multiple,
        min=smallest,
        max=max(map(max, served)) if served else largest,
    )


def frames_of(checkpoint: Checkpoint) -> Frames | None:
    """The lengths of video a bundle of this checkpoint serves; None for pictures."""
    backbone, multiple = checkpoint.backbone, checkpoint.strides.time
    default = checkpoint.defaults.frames
    if default is None:
        return None
    longest = 1 + (_LONGEST * default - 1) // multiple * multiple
    if (most := backbone.max_latent_frames(checkpoint.model_config)) is not None:
        longest = min(longest, checkpoint.strides.frames(most))
    return Frames(default=min(default, longest), multiple=multiple, first=1, max=longest, fps=checkpoint.defaults.fps)


def limits_of(checkpoint: Checkpoint, sizes: Sizes, prompting: PromptingSet, options: BuildOptions, order: int) -> Limits:
    """The limits of a bundle's engines."""
    planner, texts = prompting.planner, [text for text in (prompting.text_encoder, prompting.text_encoder_2) if text]
    vision_tokens = planner.vision.max_tokens if planner and planner.vision else 0
    planner_length = planner.max_tokens + vision_tokens if planner else 0
    text_lengths = tuple(max(text.max_tokens, text.negative_max_tokens or 0) for text in texts)
    conditioned_on_text = checkpoint.conditioning == "text_encoder"
    kept = max((len(text.select or ()) for text in texts), default=0) or max(text_lengths, default=0)
    canvas = checkpoint.config.canvas.grid_at(sizes.max, sizes.max) if checkpoint.config else (1, 1, 1)
    frames = frames_of(checkpoint)
    return Limits(
        max_batch=options.max_batch,
        max_tokens=sizes.max // sizes.multiple,
        max_canvas=max(canvas[1:]),
        planner_length=planner_length,
        text_lengths=text_lengths,
        vision_tokens=vision_tokens,
        context_length=kept if conditioned_on_text else planner_length,
        order=order,
        max_frames=checkpoint.strides.latent_frames(frames.max) if frames else 1,
    )


def parts_of(checkpoint: Checkpoint, limits: Limits, options: BuildOptions) -> list[Part]:
    """The engines to build, in the order of a request.

    Raises:
        RequestError: the options name an engine that this checkpoint does not have, or want LoRAs in one that takes none.
    """
    adapter, config = checkpoint.backbone, checkpoint.model_config
    width, context_width = adapter.width(config), adapter.prepared_context_width(config)
    keyframes = checkpoint.config.canvas.grid[0] if checkpoint.config else 1
    on_planner = checkpoint.conditioning == "planner"
    reach = Reach(
        max_batch=limits.max_batch, max_cells=limits.max_tokens * adapter.size_multiple(config), max_frames=limits.max_frames,
        scale_encoded=adapter.scales_encoded,
    )  # fmt: skip

    def vision() -> Program:
        return VisionProgram(checkpoint.load_vision_tower(), max_tokens=limits.vision_tokens)

    def planner() -> Program:
        canvas = checkpoint.load_canvas()
        context = adapter.context_preparation(checkpoint.load_model()) if on_planner else None
        return PlannerProgram(
            checkpoint.load_planner(canvas), canvas, width, context, context_width,
            max_length=limits.planner_length, max_batch=limits.max_batch, max_cells=limits.max_canvas,
            keyframes=keyframes, max_vision=limits.vision_tokens,
        )  # fmt: skip

    def text_encoder() -> Program:
        context = adapter.context_preparation(checkpoint.load_model())
        return TextEncoderProgram(
            adapter, checkpoint.load_text_encoders(), context, context_width, pooled_dim=adapter.pooled_width(config),
            max_lengths=limits.text_lengths, max_batch=limits.max_batch,
        )  # fmt: skip

    def image_encoder() -> Program:
        context = adapter.context_preparation(checkpoint.load_model())
        mean, deviation = checkpoint.image_statistics
        encoder = checkpoint.load_image_encoder()
        return ImageEncoderProgram(encoder, mean, deviation, context, context_width, max_batch=limits.max_batch)

    def step(kind: type[StepProgram]) -> Program:
        canvas = None if checkpoint.is_stock or kind is RestStepProgram else checkpoint.load_canvas()
        return kind(
            checkpoint.load_backbone(canvas), context_width, order=limits.order, max_batch=limits.max_batch,
            max_tokens=limits.max_tokens, max_length=limits.context_length, max_canvas=limits.max_canvas,
            max_frames=limits.max_frames, keyframes=keyframes,
        )  # fmt: skip

    def autoencoder(component: Component) -> Program:
        return checkpoint.autoencoder.program(component, checkpoint.load_vae(), reach)

    canvas_files = () if checkpoint.is_stock else (layout.CANVAS_WEIGHTS, METACANVAS_FILE)
    backbone = adapter.component
    parts = [
        Part("vision", (layout.PLANNER,), vision),
        Part("planner", (layout.PLANNER, layout.PLANNER_LORA, backbone, *canvas_files), planner),
        Part("text_encoder", (*(encoder.model for encoder in adapter.encoders), backbone), text_encoder),
        Part("image_encoder", (adapter.image_encoder or "", layout.FEATURE_EXTRACTOR, backbone), image_encoder),
        Part(STEP, (backbone, *canvas_files), partial(step, StepProgram)),
        Part(STEP_FIRST, (backbone, *canvas_files), partial(step, FirstStepProgram)),
        Part(STEP_REST, (backbone,), partial(step, RestStepProgram)),
        *(Part(component, (layout.VAE,), partial(autoencoder, component)) for component in checkpoint.autoencoder.components),
    ]
    told_of_media = any(condition.source in ENCODED_SOURCES for condition in adapter.conditions(config))
    no_encoder = not told_of_media and "vae_encoder" not in options.engines
    absent = {kind: checkpoint.conditioning != kind for kind in ("text_encoder", "image_encoder")}
    absent |= {"vision": limits.vision_tokens == 0, "planner": checkpoint.is_stock}
    absent |= dict.fromkeys((STEP_FIRST, STEP_REST), not options.step_cache)
    absent |= {"vae_encoder": no_encoder, "vae_encoder_next": no_encoder}
    for component in options.engines:
        if absent.get(component):
            there = ", ".join(part.component for part in parts if not absent.get(part.component))
            raise RequestError(f"--engine {component}: this checkpoint has no such engine; it has {there}")
    parts = [part for part in parts if not absent.get(part.component)]
    if not options.lora_rank:
        return parts
    read = {checkpoint.conditioning} if adapter.prepares_layers else set()
    taking = [part for part in parts if part.component in {"planner", *STEPS} | read]
    _refuse_unadapted([part.component for part in taking], options)
    return parts + [_adapted(part, options.lora_rank) for part in taking]


def _refuse_unadapted(components: Iterable[Component], options: BuildOptions) -> None:
    """Holds the wish for LoRAs against the targets and precisions of the engines that would take them.

    Raises:
        RequestError: one is to be quantized, or for a target whose kernels merge the layers that a LoRA would change.
    """
    # The parts of a step have its choice, and its name on the command line.
    choices = {STEP if name in STEPS else name: options.choice(name) for name in components}
    for choice in choices.values():
        if choice.target in _WITHOUT_LORA:
            raise RequestError(
                f"--lora-rank: {choice.target} merges layers that a LoRA changes one by one; take another target"
            )
    unmade = "--lora-rank: a LoRA's products are not calibrated, so"
    quantized = {name: choice for name, choice in choices.items() if choice.is_quantized}
    if quantized:
        precisions = " or ".join(dict.fromkeys(choice.precision.value for choice in quantized.values()))
        instead = " ".join(
            f"--engine {name}={choice.target}:{'bf16' if choice.is_by_layer else 'fp32'}" for name, choice in quantized.items()
        )
        raise RequestError(
            f"{unmade} {' and '.join(quantized)} cannot take one in {precisions}; say {instead}, or leave --lora-rank out"
        )
    spare = options.fallback
    if spare is not None and spare.is_quantized:
        raise RequestError(
            f"{unmade} {' and '.join(choices)} cannot take one in {spare.precision}; say --fallback {spare.target}:fp32, or "
            "leave --lora-rank out"
        )


def _adapted(part: Part, rank: int) -> Part:
    """The same engine with LoRAs of up to a rank among its inputs."""
    return Part(part.component + LORA_SUFFIX, part.sources, lambda: AdaptedProgram(part.make(), rank), rank)


def facts_of(part: Part, checkpoint: Checkpoint, limits: Limits, hashes: dict[str, str]) -> dict[str, Any]:
    """Everything of the checkpoint and the options that decides what a part's engine is, but for target and precision.

    `hashes` keeps what was hashed, from one part to the next.
    """
    for source in part.sources:
        if source not in hashes:
            path = checkpoint.path / source
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            hashes[source] = sha256_of_files(checkpoint.path, files)
    reach = asdict(limits)
    if part.component.removesuffix(LORA_SUFFIX) not in STEPS:
        del reach["order"]  # another scheduler rebuilds the step alone
    if part.component == "vision":
        reach = {"vision_tokens": limits.vision_tokens}
    return {
        "component": part.component,
        "backbone": checkpoint.backbone.name,  # two may share a model's class, and give its engines other inputs
        "weights": {source: hashes[source] for source in part.sources},
        "limits": reach,
        "conditioning": checkpoint.conditioning,
        "lora_rank": part.lora_rank,
    }
