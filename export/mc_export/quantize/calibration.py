"""What engines are calibrated on: their inputs in real requests, prompts read and pictures denoised by the torch modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mc_export.autoencoders.feeds import autoencoder_feeds
from mc_export.backbones.base import Backbone
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import Calibration
from mc_export.program.step import StepProgram
from mc_export.quantize.cut_step import cut_step_inputs
from mc_export.quantize.media import PICTURES, calibration_media
from mc_export.reference import ReferencePipeline
from mc_export.reference.media import MediaEncoder
from mc_export.reference.pictures import PictureReader, encode_with_pictures
from mc_export.reference.pipeline import Conditions
from mc_export.reference.prompts import chat_text, encode_for_planner
from mc_export.reference.told import Asked, latent_extents, told_by_request
from mc_export.sampler import build_sampler_table
from mc_export.vision import planner_vision
from mc_runtime.bundle.engines import STEP, STEP_FIRST, STEP_REST
from mc_runtime.media.clip import Clip
from mc_runtime.prompting.vision import look_at, tower_inputs
from mc_runtime.sampling.noise import initial_noise
from mc_runtime.sampling.tables import Schedule

#: Prompts of the kinds people ask for: counts, colours, positions, scenes, styles, one word, many words.
PROMPTS = (
    "a red circle left of a blue square",
    "a photo of two dogs running on a beach at sunset",
    "an oil painting of an old stone bridge over a quiet river, autumn leaves, soft light, highly detailed",
    "a green bench and a yellow bird",
    "cat",
    "three glass bottles above a wooden table, studio photograph",
    "a futuristic city at night with neon signs that reflect in wet streets, seen from above, wide angle, cinematic",
    "a purple triangle below a white star",
)

# What calibration may cost, as parameters x tokens x evaluations of the backbone: a minute or two of two cores.
_WORK = 3e12
_MIN_STEPS = 4
# Latent frames of a video: the first one, which may be given, and two that follow.
_MOST_FRAMES = 3
# Pictures that a vision tower, a planner or an image encoder is calibrated on.
_SHOWN = 8
# Quantizers keep a few of the step's inputs for measuring; more tell them little.
MAX_STEP_INPUTS = 16

# What one checkpoint's pictures gave, so that step and autoencoder share one run.
_recorded: dict[str, dict[str, Calibration]] = {}


def calibration_inputs(checkpoint: Checkpoint, component: str, seed: int = 0) -> Calibration:
    """Inputs of an engine as requests for pictures have them, the same ones every time.

    Args:
        checkpoint: an opened checkpoint. Its `metacanvas.json` may name prompts of its own in `prompt.calibration`.
        component: the engine.
        seed: of the first picture's noise.

    Returns:
        One dict of named arrays a run of the engine. Inputs that do not change over a request's steps are shared, not copied.
    """
    prompts = calibration_prompts(checkpoint)
    if component == "vision":
        return _vision_inputs(checkpoint, seed)
    if component == "planner":
        return _planner_inputs(checkpoint, prompts, seed)
    if component == "image_encoder":
        return [{"pixels": picture[None].astype(np.float32) / 255} for picture in _shown(checkpoint, seed)]
    if component == "text_encoder":
        return _text_encoder_inputs(checkpoint, prompts)
    if component in (STEP_FIRST, STEP_REST):
        return cut_step_inputs(checkpoint, calibration_inputs(checkpoint, STEP, seed), component)
    key = f"{checkpoint.sha256}-{seed}"
    if key not in _recorded:
        _recorded.clear()
        _recorded[key] = _record(checkpoint, prompts, seed)
    return _recorded[key][component]


def calibration_prompts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The checkpoint's own prompts, or the built-in ones, but for those over its planner's limit."""
    config = checkpoint.config
    if config is None:
        return PROMPTS
    tokenizer = checkpoint.load_planner_tokenizer()

    def fits(prompt: str) -> bool:
        return len(tokenizer(chat_text(tokenizer, config, prompt)).input_ids) <= config.prompt.max_tokens

    return tuple(filter(fits, config.prompt.calibration or PROMPTS)) or ("",)


@torch.inference_mode()
def _planner_inputs(checkpoint: Checkpoint, prompts: Sequence[str], seed: int) -> Calibration:
    """Every prompt and the empty one, at the default size; where the planner sees, each with a picture."""
    config = checkpoint.config
    assert config is not None
    grid = config.canvas.grid_at(*checkpoint.default_size)
    tokenizer = checkpoint.load_planner_tokenizer()
    if not config.reads_pictures:
        return [_arrays(encode_for_planner(tokenizer, config, [prompt], grid)) for prompt in (*prompts, "")]
    pictures, read = _shown(checkpoint, seed), PictureReader(checkpoint)
    planner = checkpoint.load_planner(checkpoint.load_canvas())
    return [
        _arrays(encode_with_pictures(planner, tokenizer, config, [prompt], grid, read([pictures[index % len(pictures)]])))
        for index, prompt in enumerate((*prompts, ""))
    ]


def _vision_inputs(checkpoint: Checkpoint, seed: int) -> Calibration:
    """One picture a run."""
    spec = planner_vision(checkpoint)
    assert spec is not None
    return [tower_inputs(look_at([picture], spec), spec) for picture in _shown(checkpoint, seed)]


def _shown(checkpoint: Checkpoint, seed: int) -> list[NDArray[np.uint8]]:
    """Pictures `[h, w, 3]` to look at, of the checkpoint's own size."""
    return [PICTURES[index % len(PICTURES)](checkpoint.default_size, seed + index) for index in range(_SHOWN)]


def _text_encoder_inputs(checkpoint: Checkpoint, prompts: Sequence[str]) -> Calibration:
    tokenizers, backbone = checkpoint.load_tokenizers(), checkpoint.backbone
    encoded = [backbone.text_tokens(tokenizers, [prompt]) for prompt in prompts]
    encoded.append(backbone.text_tokens(tokenizers, [""], negative=True))
    return [_arrays(tokens.engine_inputs()) for tokens in encoded]


@torch.inference_mode()
def _record(checkpoint: Checkpoint, prompts: Sequence[str], seed: int) -> dict[str, Calibration]:
    """Draws pictures and keeps what each engine was given.

    With more than one picture, each gives other steps of the schedule, so that all timesteps are seen whatever the budget.
    """
    reference = ReferencePipeline(checkpoint)
    adapter, config = checkpoint.backbone, checkpoint.model_config
    extents = latent_extents(checkpoint, checkpoint.default_size)
    extents |= {"T": min(extents["T"], _MOST_FRAMES)} if "T" in extents else {}
    shape = (adapter.latent_channels(config), *(extents[axis] for axis in adapter.latent_axes))
    tokens = math.prod(shape[1:]) // math.prod(adapter.patch(config))
    pictures, steps = _affordable(reference.backbone, tokens, checkpoint.defaults.steps, len(prompts))
    scale = checkpoint.defaults.guidance_scale
    guided = adapter.weighs_branches(scale)
    frames = checkpoint.strides.frames(extents["T"]) if "T" in extents else None
    media = [given for draw in PICTURES for given in calibration_media(checkpoint, frames, seed, draw)]
    told = []
    for index, prompt in enumerate(prompts[:pictures]):
        given = media[index // 2 % len(media)]  # of pictures in turn, every other one's steps may be all that are kept
        branches = _branches(reference, prompt, given.media, guided=guided)
        encoder = MediaEncoder(checkpoint, reference.vae, reference.dtype)
        asked = Asked(checkpoint, extents, scale, (seed + index,), given, encoder)
        told.append((branches, told_by_request(asked, len(branches))))
    prepare = adapter.context_preparation(reference.backbone.model)
    schedule = _schedule(checkpoint, tokens, steps)
    program = StepProgram(reference.backbone, adapter.prepared_context_width(config), order=schedule.order)
    program.eval()
    kept_steps: Calibration = []
    latents: list[Tensor] = []
    for index, (branches, conditions) in enumerate(told):
        constant = conditions | {"guidance": _guidance(adapter, len(branches), scale, shape[1])}
        constant |= _constant_inputs(branches, prepare)
        constant = {spec.name: constant[spec.name] for spec in program.inputs if spec.name in constant}
        noise = torch.from_numpy(initial_noise(seed + index, shape))
        inputs, latent = _denoised(program, schedule, noise[None] * schedule.init_noise_sigma, constant)
        kept_steps += inputs[index % pictures :: pictures]
        latents.append(latent)
    stride = -(-len(kept_steps) // MAX_STEP_INPUTS)
    coded = [autoencoder_feeds(reference.vae, latent) for latent in latents]
    return {
        "step": sorted(kept_steps, key=lambda inputs: -float(inputs["timestep"][0]))[::stride],
        **{component: [_arrays(feed) for feeds in coded for feed in feeds[component]] for component in coded[0]},
    }


def _affordable(backbone: nn.Module, tokens: int, steps: int, prompts: int) -> tuple[int, int]:
    """How many pictures, of how many steps: by the work they are, not by the clock, so that it is the same every time."""
    evaluations = int(_WORK / (sum(weight.numel() for weight in backbone.parameters()) * tokens * 2))
    if evaluations < steps:
        return 1, min(steps, max(_MIN_STEPS, evaluations))
    return min(prompts, evaluations // steps), steps


def _branches(reference: ReferencePipeline, prompt: str, media: Sequence[Image.Image | Clip], guided: bool) -> list[Conditions]:
    """What the prompt's own branch is told, and the empty one's."""
    size = reference.checkpoint.default_size
    empty = [reference.conditions([""], size, negative=True, media=media)] if guided else []
    return [reference.conditions([prompt], size, media=media), *empty]


def _guidance(adapter: Backbone, branches: int, scale: float, frames: int) -> Tensor:
    """Weights of the branches `[1, G]`, or `[1, G, T]` where every frame has its own scale."""
    ramp = adapter.guidance_ramp_from
    scales = torch.tensor(scale) if ramp is None else torch.linspace(ramp, scale, frames)
    return torch.stack([scales, 1 - scales] if branches == 2 else [torch.ones_like(scales)])[None]


def _constant_inputs(conditions: Sequence[Conditions], prepare: nn.Module) -> dict[str, Tensor]:
    """The step's inputs that no step changes, of one picture."""
    longest = max(branch.context.shape[1] for branch in conditions)

    def padded(rows: Tensor) -> Tensor:
        filler = rows.new_zeros(1, longest - rows.shape[1], *rows.shape[2:])
        return torch.cat([rows, filler], dim=1)

    inputs = {
        "context": torch.stack([padded(prepare(branch.context)) for branch in conditions], dim=1),
        "context_mask": torch.stack([padded(branch.mask) for branch in conditions], dim=1).to(torch.int64),
    }
    pooled = [branch.pooled for branch in conditions if branch.pooled is not None]
    if pooled:
        inputs["pooled"] = torch.stack(pooled, dim=1)
    canvases = [branch.canvas for branch in conditions if branch.canvas is not None]
    if canvases:
        inputs["canvas"] = torch.stack(canvases, dim=1)
    return inputs


def _denoised(
    program: StepProgram, schedule: Schedule, noise: Tensor, constant: dict[str, Tensor]
) -> tuple[Calibration, Tensor]:
    """The step's inputs at every step, and the latents it ends in."""
    state = {"sample": noise}
    history = 2 * (schedule.order - 1)
    if history:
        state["history"] = noise.new_zeros(1, history, *noise.shape[1:])
    shared = _arrays(constant)
    recorded: Calibration = []
    for timestep, coefficients in zip(schedule.timesteps, schedule.coefficients, strict=True):
        scalars = {"timestep": torch.from_numpy(timestep[None]), "coefficients": torch.from_numpy(coefficients[None])}
        recorded.append(shared | _arrays(state | scalars))
        outputs = program.run({**state, **scalars, **constant})
        state = {"sample": outputs["next_sample"]}
        if history:
            state["history"] = outputs["next_history"]
    return recorded, state["sample"]


def _schedule(checkpoint: Checkpoint, tokens: int, steps: int) -> Schedule:
    scheduler: Any = checkpoint.load_scheduler()
    arguments: dict[str, Any] = {
        "max_steps": steps, "step_counts": [steps],
        "timestep_scale": checkpoint.backbone.timestep_scale(checkpoint.model_config),
    }  # fmt: skip
    if scheduler.config.get("use_dynamic_shifting"):
        arguments["token_counts"] = [tokens]
    set_timesteps = checkpoint.backbone.set_timesteps(scheduler)
    return build_sampler_table(scheduler, set_timesteps=set_timesteps, **arguments).schedule(steps, tokens)


def _arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
