"""The sizes of an engine's dimensions that most requests have, for targets that tune an engine for them."""

from __future__ import annotations

from mc_export.build.parts import frames_of
from mc_export.build.plan import PlanWishes
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_runtime.bundle.engines import LORA_SUFFIX, STEP, STEP_FIRST, STEPS
from mc_runtime.bundle.manifest import Component, Sizes

_ON_LATENTS = (*STEPS, "vae_decoder", "vae_decoder_next")
_ON_CANVAS = (STEP, STEP_FIRST, "planner")
_ON_PIXELS = ("vae_encoder", "vae_encoder_next")


def plan_wishes(component: Component, checkpoint: Checkpoint, sizes: Sizes, capabilities: tuple[str, ...] = ()) -> PlanWishes:
    """What a plan of a component is tuned for: one result of the default size, and the sizes that are the only ones served."""
    component = component.removesuffix(LORA_SUFFIX)
    usual = {"B": 1, "G": checkpoint.backbone.guidance_branches, **extents_at(component, checkpoint, sizes.default)}
    frames = frames_of(checkpoint)
    if frames is not None:
        usual["T"] = checkpoint.strides.latent_frames(frames.default)
    fixed = component in (*_ON_LATENTS, *_ON_CANVAS)  # pictures that come in have sizes of their own
    served = tuple(extents_at(component, checkpoint, size) for size in sizes.served or ()) if fixed else ()
    return PlanWishes(usual, served, capabilities)


def extents_at(component: Component, checkpoint: Checkpoint, size: tuple[int, int]) -> dict[str, int]:
    """The dimensions of a component that a picture's size (height, width) in pixels decides."""
    height, width = size
    found: dict[str, int] = {}
    if component in _ON_LATENTS:
        scale = checkpoint.pixels_per_latent
        found |= {"H": height // scale, "W": width // scale}
    if component in _ON_CANVAS and checkpoint.config is not None:
        _, rows, columns = checkpoint.config.canvas.grid_at(height, width)
        found |= {"h": rows, "w": columns}
    if component in _ON_PIXELS:
        found |= {"h": height, "w": width}
    return found
