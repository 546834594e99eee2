"""The reference pipeline: plain torch, diffusers' own scheduler, no export. What every bundle is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mc_export.checkpoint.load import Checkpoint, load_checkpoint
from mc_export.reference.pictures import PictureReader, encode_with_pictures
from mc_export.reference.prompts import encode_for_planner
from mc_runtime.media.clip import Clip
from mc_runtime.sampling.noise import initial_noise


@dataclass(frozen=True)
class ReferenceResult:
    """Latents ``[n, C, (T,) H, W]`` as denoised, and pictures unless only latents were asked for."""

    latents: np.ndarray
    images: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True)
class Conditions:
    """What the backbone is told of one branch.

    Context ``[B, L, D]``, its mask ``[B, L]``, the plan ``[B, t, h, w, D]``, a pooled vector ``[B, P]``.
    """

    context: Tensor
    mask: Tensor
    canvas: Tensor | None
    pooled: Tensor | None = None


class ReferencePipeline:
    """A checkpoint run by torch.

    Args:
        checkpoint: an opened checkpoint.
        dtype: of planner, text encoder, backbone and autoencoder; the sampler works in float32, as diffusers' pipelines do.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.canvas = None if checkpoint.is_stock else checkpoint.load_canvas(dtype)
        self.backbone = checkpoint.load_backbone(self.canvas, dtype)
        self.vae = checkpoint.load_vae(dtype)
        self.planner = checkpoint.load_planner(self.canvas, dtype) if self.canvas else None
        self.planner_tokenizer = checkpoint.load_planner_tokenizer() if self.canvas else None
        self.read_pictures = PictureReader(checkpoint) if self.reads_pictures else None
        kept = checkpoint.conditioning == "text_encoder"
        self.text_encoders = checkpoint.load_text_encoders(dtype) if kept else []
        self.tokenizers = checkpoint.load_tokenizers() if kept else []

    @property
    def reads_pictures(self) -> bool:
        """Whether the planner sees."""
        return self.checkpoint.config is not None and self.checkpoint.config.reads_pictures

    @classmethod
    def from_checkpoint(cls, source: str | Path, dtype: torch.dtype = torch.float32) -> ReferencePipeline:
        """Opens and loads ``source``."""
        return cls(load_checkpoint(source), dtype)

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | None = None,
        output: str = "images",
        canvas: bool = True,
    ) -> ReferenceResult:
        """Draws pictures or, with ``output="latents"``, clips; arguments as :meth:`mc_runtime.Runtime.generate`.

        Besides, ``canvas=False`` leaves the plan out, and ``conditions`` are further inputs of the backbone's step
        (`Backbone.conditions`) by name, ``[n, ...]``; what is not given is zero.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        adapter, config = self.checkpoint.backbone, self.checkpoint.model_config
        steps = adapter.default_steps if steps is None else steps
        scale = adapter.default_guidance if guidance_scale is None else guidance_scale
        latent_size = adapter.default_latent_size(config)
        height, width = size or tuple(extent * self.checkpoint.pixels_per_latent for extent in latent_size)
        extents = {"H": height // self.checkpoint.pixels_per_latent, "W": width // self.checkpoint.pixels_per_latent}
        if adapter.default_frames is not None:
            extents["T"] = self.checkpoint.strides.latent_frames(frames or adapter.default_frames)
        shape = (adapter.latent_channels(config), *(extents[axis] for axis in adapter.latent_axes))

        branches = [self.conditions(prompts, (height, width), canvas)]
        if scale > 1:
            branches.append(self.conditions([negative_prompt] * len(prompts), (height, width), canvas, negative=True))
        branches = [_repeated(branch, num_images) for branch in branches]
        count = len(prompts) * num_images
        seeds = [seed + index for index in range(count)] if isinstance(seed, int) else list(seed)
        if latents is None:
            latents = np.stack([initial_noise(each, shape) for each in seeds])
        told = self._told(conditions or {}, extents, count)
        denoised = self.denoise(torch.from_numpy(latents), branches, steps, scale, told)
        if output == "latents":
            return ReferenceResult(denoised.numpy())
        return ReferenceResult(denoised.numpy(), self.decode(denoised))

    def conditions(
        self,
        prompts: list[str],
        size: tuple[int, int],
        canvas: bool = True,
        negative: bool = False,
        media: Sequence[Image.Image | np.ndarray | Clip] = (),
    ) -> Conditions:
        """Reads the prompts, each with the same pictures and clips, and plans them, once a request."""
        context, mask, plan, pooled = None, None, None, None
        if self.planner is not None and self.canvas is not None and self.checkpoint.config is not None:
            grid = self.checkpoint.config.canvas.grid_at(*size)
            if media and self.read_pictures is not None:
                pictures = self.read_pictures(media)
                encoded = encode_with_pictures(
                    self.planner, self.planner_tokenizer, self.checkpoint.config, prompts, grid, pictures
                )
            else:
                encoded = encode_for_planner(self.planner_tokenizer, self.checkpoint.config, prompts, grid)
            states = self.planner(**encoded)
            plan = self.canvas.canvas_connector.draw(states.canvas) if canvas else None
            if self.canvas.context_connector is not None:
                context, mask = self.canvas.context_connector(states.context), encoded["attention_mask"]
            if self.canvas.pooled_connector is not None:
                pooled = self.canvas.pooled_connector.of_rows(states.context, encoded["attention_mask"])
        if self.text_encoders:
            tokens = self.checkpoint.backbone.text_tokens(self.tokenizers, prompts, negative=negative)
            states = self.checkpoint.backbone.encode_text(self.text_encoders, tokens.input_ids, tokens.attention_masks)
            context = states.context if tokens.select is None else states.context[:, tokens.select]
            mask, pooled = tokens.context_mask, states.pooled
        assert context is not None
        assert mask is not None
        return Conditions(context, mask, plan, pooled)

    def _told(self, given: Mapping[str, np.ndarray], extents: Mapping[str, int], count: int) -> dict[str, Tensor]:
        """The backbone's further inputs that all branches share."""
        adapter, config = self.checkpoint.backbone, self.checkpoint.model_config
        sizes = {axis.name: axis.min for axis in adapter.condition_axes(config, 64)} | dict(extents)
        told: dict[str, Tensor] = {}
        for condition in adapter.conditions(config):
            if condition.name in given:
                told[condition.name] = torch.from_numpy(given[condition.name])
            elif not condition.per_branch:
                shape = (sizes[size] if isinstance(size, str) else size for size in condition.shape)
                told[condition.name] = torch.zeros(count, *shape)
        return told

    def denoise(
        self, noise: Tensor, branches: list[Conditions], steps: int, scale: float, told: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The denoising loop with the checkpoint's own scheduler; guidance as in diffusers' pipelines.

        ``told`` are the backbone's further inputs, a row a sample, shared by the branches.
        """
        told = dict(told or {})
        scheduler = self.checkpoint.load_scheduler()
        scheduler.set_timesteps(steps)
        timestep_scale = self.checkpoint.backbone.timestep_scale(self.checkpoint.model_config)
        joined = _joined(branches)
        latents = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
            when = (timestep * timestep_scale).expand(len(joined.context)).to(torch.float32)
            every = {name: torch.cat([rows] * len(branches)) for name, rows in told.items()}
            prediction = self._predict(torch.cat([model_input] * len(branches)), when, joined, every)
            if len(branches) == 2:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + scale * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            latents = self.checkpoint.backbone.settled(latents, **told)
        return latents

    def _predict(self, sample: Tensor, timestep: Tensor, branch: Conditions, told: Mapping[str, Tensor]) -> Tensor:
        pooled = {} if branch.pooled is None else {"pooled": branch.pooled.to(self.dtype)}
        prediction = self.backbone(
            sample.to(self.dtype), timestep, branch.context.to(self.dtype), branch.mask, canvas=branch.canvas, **told, **pooled
        )
        return prediction.float()

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents to pictures."""
        scaled = latents.to(self.dtype) / self.vae.config.scaling_factor
        pixels = (self.vae.decode(scaled, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        array = (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in array]


def _joined(branches: list[Conditions]) -> Conditions:
    """All branches as one batch, as diffusers' pipelines run them; shorter contexts are padded with masked rows."""
    length = max(branch.context.shape[1] for branch in branches)
    contexts = [F.pad(branch.context, (0, 0, 0, length - branch.context.shape[1])) for branch in branches]
    masks = [F.pad(branch.mask, (0, length - branch.mask.shape[1])) for branch in branches]
    plans = [branch.canvas for branch in branches if branch.canvas is not None]
    pooled = [branch.pooled for branch in branches if branch.pooled is not None]
    return Conditions(
        torch.cat(contexts), torch.cat(masks), torch.cat(plans) if plans else None, torch.cat(pooled) if pooled else None
    )


def _repeated(branch: Conditions, count: int) -> Conditions:
    repeat: Any = lambda tensor: tensor.repeat_interleave(count, dim=0) if tensor is not None else None  # noqa: E731
    return Conditions(repeat(branch.context), repeat(branch.mask), repeat(branch.canvas), repeat(branch.pooled))
