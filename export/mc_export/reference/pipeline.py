"""The reference pipeline: plain torch, diffusers' own scheduler, no export. What every bundle is compared with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.checkpoint.load import load_checkpoint
from mc_export.reference.media import MediaEncoder, given_media
from mc_export.reference.pictures import PictureReader, encode_with_pictures
from mc_export.reference.prompts import encode_for_planner
from mc_export.reference.told import Asked, latent_extents, told_by_request
from mc_export.sampler.timesteps import plain_timesteps
from mc_runtime.errors import RequestError
from mc_runtime.media.clip import Clip
from mc_runtime.sampling.noise import initial_noise


@dataclass(frozen=True)
class ReferenceResult:
    """Latents ``[n, C, (T,) H, W]`` as denoised; pictures or videos unless only latents were asked for."""

    latents: np.ndarray
    images: list[Image.Image] = field(default_factory=list)
    clips: list[np.ndarray] = field(default_factory=list)


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
        self.image_encoder = checkpoint.load_image_encoder(dtype) if checkpoint.conditioning == "image_encoder" else None

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
        task: str | None = None,
        negative_prompt: str = "",
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0,
        size: tuple[int, int] | None = None,
        conditions: Mapping[str, np.ndarray] | None = None,
        seed: int | Sequence[int] = 0,
        latents: np.ndarray | None = None,
        output: str = "images",
        canvas: bool = True,
        **media: Any,
    ) -> ReferenceResult:
        """Draws, edits or films; arguments as :meth:`mc_runtime.Runtime.generate`, ``media`` those of :func:`given_media`.

        Besides, ``canvas=False`` leaves the plan out, and ``conditions`` are further inputs of the backbone's step
        (`Backbone.conditions`) by name, ``[n, ...]``, in place of what the request says.

        Raises:
            RequestError: the checkpoint cannot do the task, or a picture or clip cannot be opened.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        adapter, config = self.checkpoint.backbone, self.checkpoint.model_config
        steps = self.checkpoint.defaults.steps if steps is None else steps
        scale = self.checkpoint.defaults.guidance_scale if guidance_scale is None else guidance_scale
        size = size or self.checkpoint.default_size
        given = given_media(self.checkpoint, task, **media)
        extents = latent_extents(self.checkpoint, size, given.frames)
        shape = (adapter.latent_channels(config), *(extents[axis] for axis in adapter.latent_axes))

        branches = [self.conditions(prompts, size, canvas, media=given.media)]
        weight = true_cfg_scale if adapter.embeds_guidance else scale
        if adapter.guidance_branches > 1 and weight > 1:
            negatives = [negative_prompt] * len(prompts)
            branches.append(self.conditions(negatives, size, canvas, negative=True, media=given.media))
        branches = [_repeated(branch, num_images) for branch in branches]
        count = len(prompts) * num_images
        seeds = [seed + index for index in range(count)] if isinstance(seed, int) else list(seed)
        if latents is None:
            latents = np.stack([initial_noise(each, shape) for each in seeds])
        encoder = MediaEncoder(self.checkpoint, self.vae, self.dtype)
        told = told_by_request(Asked(self.checkpoint, extents, scale, seeds, given, encoder), len(branches), conditions)
        denoised = self.denoise(torch.from_numpy(latents), branches, steps, weight, told)
        if output == "latents":
            return ReferenceResult(denoised.numpy())
        if denoised.ndim == 5:
            return ReferenceResult(denoised.numpy(), clips=self.decode_clips(denoised))
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
            if negative and not any(prompts) and self.checkpoint.zeroes_empty_negative:
                context, pooled = torch.zeros_like(context), None if pooled is None else torch.zeros_like(pooled)
        if self.image_encoder is not None:
            context = self._embedded(media).expand(len(prompts), -1, -1)
            mask = torch.ones(context.shape[:2], dtype=torch.int64)
            if negative and self.checkpoint.zeroes_empty_negative:
                context = torch.zeros_like(context)
        assert context is not None
        assert mask is not None
        return Conditions(context, mask, plan, pooled)

    def _embedded(self, media: Sequence[Image.Image | np.ndarray | Clip]) -> Tensor:
        """The context `[1, L, D]` that a stock checkpoint has of a picture."""
        assert self.image_encoder is not None
        picture = next((one for one in media if isinstance(one, Image.Image)), None)
        if picture is None:
            raise RequestError("this checkpoint's context is a picture's embedding; give image=...")
        pixels = torch.from_numpy(np.array(picture, np.float32) / 255).movedim(-1, 0)[None]
        statistics = self.checkpoint.image_statistics
        return self.checkpoint.backbone.embed_picture(self.image_encoder, pixels.to(self.dtype), *statistics)

    def denoise(
        self, noise: Tensor, branches: list[Conditions], steps: int, scale: float, told: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The denoising loop with the checkpoint's own scheduler; guidance as in diffusers' pipelines.

        ``told`` are the backbone's further inputs, see :func:`told_by_request`.
        """
        adapter, config = self.checkpoint.backbone, self.checkpoint.model_config
        own = {condition.name for condition in adapter.conditions(config) if condition.per_branch}
        shared = {name: rows for name, rows in (told or {}).items() if name not in own}
        every = {name: torch.cat([rows] * len(branches)) for name, rows in shared.items()}
        every |= {name: (told or {})[name].transpose(0, 1).flatten(0, 1) for name in own & set(told or {})}
        ramp = self.checkpoint.backbone.guidance_ramp_from
        scales = torch.tensor(scale) if ramp is None else torch.linspace(ramp, scale, noise.shape[2])[:, None, None]
        scheduler = self.checkpoint.load_scheduler()
        set_timesteps = adapter.set_timesteps(scheduler) or plain_timesteps
        set_timesteps(scheduler, steps, math.prod(noise.shape[2:]) // math.prod(adapter.patch(config)))
        timestep_scale = adapter.timestep_scale(config)
        joined = _joined(branches)
        latents = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
            when = (timestep * timestep_scale).expand(len(joined.context)).to(torch.float32)
            prediction = self._predict(torch.cat([model_input] * len(branches)), when, joined, every)
            if len(branches) == 2:
                conditional, unconditional = prediction.chunk(2)
                prediction = unconditional + scales * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            latents = adapter.settled(latents, **shared)
        return latents

    def _predict(self, sample: Tensor, timestep: Tensor, branch: Conditions, told: Mapping[str, Tensor]) -> Tensor:
        pooled = {} if branch.pooled is None else {"pooled": branch.pooled.to(self.dtype)}
        prediction = self.backbone(
            sample.to(self.dtype), timestep, branch.context.to(self.dtype), branch.mask, canvas=branch.canvas, **told, **pooled
        )
        return prediction.float()

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents to pictures."""
        pixels = (self._decoded(latents) / 2 + 0.5).clamp(0, 1)
        array = (pixels.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        return [Image.fromarray(picture) for picture in array]

    def decode_clips(self, latents: Tensor) -> list[np.ndarray]:
        """Latents ``[n, C, T, H, W]`` to videos, f32 ``[F, h, w, 3]`` in [0, 1] each."""
        if self.checkpoint.strides.time > 1:
            frames = self._decoded(latents).transpose(1, 2)
        else:  # an autoencoder that takes frames as pictures, whether it mixes neighbours or not
            frames = self._decoded(latents.transpose(1, 2).flatten(0, 1), frames=latents.shape[2])
            frames = frames.unflatten(0, (len(latents), -1))
        return list((frames / 2 + 0.5).clamp(0, 1).movedim(2, -1).numpy())

    def _decoded(self, latents: Tensor, frames: int | None = None) -> Tensor:
        """What diffusers' autoencoder makes of latents, from -1 to 1; ``frames`` is told to one that mixes frames."""
        values = self.checkpoint.autoencoder.scaling(self.checkpoint.vae_config).to(self.dtype).values(latents.to(self.dtype))
        mixes = "num_frames" in inspect.signature(self.vae.decode).parameters
        arguments = {"num_frames": frames} if mixes else {}
        decoded: Tensor = self.vae.decode(values, return_dict=False, **arguments)[0].float()
        return decoded


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
