"""The `step` engine: one whole denoising step, from latents to the next latents."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mc_export.backbones.sana_block import use_exportable_blocks
from mc_export.backbones.sana_export import use_exportable_self_attention
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Axis, Extents, Program, float_tensor, int_tensor, right_padded_mask, shape_of
from mc_export.program.timesteps import SharedSinusoids
from mc_export.program.update import guided_update

CONNECTOR_TIMESTEPS = "connector.step_block.time_embed.emb.time_proj"


class StepProgram(Program):
    """Input scaling, canvas injection, backbone, guidance and the sampler's update, all scalars per sample.

    With `K = 2 (order - 1)`, `history` `[B, K, C, (T,) H, W]` holds the previous samples, newest first, then the previous
    predictions, newest first. Guidance and update (`update`, which a rewrite may replace) are in float32 whatever the backbone
    computes in.

    Attributes:
        drawn: what examples are drawn for, in this order: the inputs of a whole step, whatever those of a cut one are.

    Args:
        backbone: the backbone with its canvas connector; changed in place to take the prepared context.
        context_dim: width of the prepared context.
        order: of the sampler: how many samples, and as many predictions, the next one is made of.
        max_batch: the largest batch.
        max_tokens: the largest extent along height and width, in multiples that sizes have (`Backbone.size_multiple`).
        max_length: the longest context.
        max_canvas: the largest canvas extent along height and width.
        max_frames: the most latent frames of a video.
        keyframes: of the canvas.
    """

    component = "step"

    def __init__(
        self,
        backbone: CanvasBackbone,
        context_dim: int,
        *,
        order: int = 1,
        max_batch: int = 64,
        max_tokens: int = 128,
        max_length: int = 4096,
        max_canvas: int = 128,
        max_frames: int = 64,
        keyframes: int = 1,
    ) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        adapter, config = backbone.backbone, backbone.model.config
        timestep_layers = [f"model.{name}" for name in adapter.timestep_layers(backbone.model)]
        adapter.prepare_for_export(backbone.model)
        if backbone.connector is not None:
            use_exportable_self_attention(backbone.connector)
            use_exportable_blocks(backbone.connector)
            timestep_layers.append(CONNECTOR_TIMESTEPS)
        self.sinusoids = SharedSinusoids(backbone, timestep_layers)
        ranks = {condition.name: 1 + len(condition.shape) for condition in adapter.conditions(config)}
        self.scalar_sinusoids = nn.ModuleDict(
            {
                condition: SharedSinusoids(backbone, [f"model.{name}" for name in layers], ranks[condition])
                for condition, layers in adapter.scalar_layers(backbone.model).items()
            }
        )
        self.backbone = backbone
        self.update = guided_update
        self.adaptable = {"backbone.model": adapter.component}
        self.order = order
        self.conditions = adapter.conditions(config)
        latent: tuple[int | str, ...] = ("B", adapter.latent_channels(config), *adapter.latent_axes)
        self.latent_rank = len(latent)
        history = 2 * (order - 1)
        ramped = adapter.guidance_ramp_from is not None
        inputs = [
            float_tensor("sample", *latent),
            *([float_tensor("history", "B", history, *latent[1:])] if history else []),
            float_tensor("timestep", "B"),
            float_tensor("coefficients", "B", 1 + 2 * order),
            float_tensor("guidance", "B", "G", *(["T"] if ramped else [])),
            float_tensor("context", "B", "G", "L", context_dim),
            int_tensor("context_mask", "B", "G", "L"),
            *(
                float_tensor(condition.name, "B", *(["G"] if condition.per_branch else []), *condition.shape)
                for condition in self.conditions
            ),
        ]
        if backbone.connector is not None:
            inputs.append(float_tensor("canvas", "B", "G", keyframes, "h", "w", adapter.width(config)))
        self.inputs = tuple(inputs)
        self.drawn = self.inputs
        outputs = [float_tensor("next_sample", *latent)]
        if history:
            outputs.append(float_tensor("next_history", "B", history, *latent[1:]))
        self.outputs = tuple(outputs)
        multiple = adapter.size_multiple(config)
        longest = min(max(8, max_frames), adapter.max_latent_frames(config) or sys.maxsize)
        axes = [
            Axis("B", 1, max(2, max_batch), 2),
            Axis("G", 1, max(2, adapter.guidance_branches), max(2, adapter.guidance_branches)),
            *([Axis("T", 1, longest, 3)] if "T" in latent else []),
            Axis("H", 2 * multiple, max(10, max_tokens) * multiple, 6 * multiple, multiple),
            Axis("W", 2 * multiple, max(10, max_tokens) * multiple, 5 * multiple, multiple),
            Axis("L", 1, max(16, max_length), 7),
            *adapter.condition_axes(config, max(10, max_tokens)),
        ]
        if backbone.connector is not None:
            axes += [Axis("h", 1, max(8, max_canvas), 4), Axis("w", 1, max(8, max_canvas), 3)]
        self.axes = {axis.name: axis for axis in axes}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        context: Tensor,
        context_mask: Tensor,
        history: Tensor | None = None,
        canvas: Tensor | None = None,
        **conditions: Tensor,
    ) -> tuple[Tensor, ...]:
        batch, branches = guidance.shape[:2]
        scale = coefficients[:, :1].unflatten(1, (-1, *[1] * (self.latent_rank - 1)))[:, 0]  # [B, 1, ..., 1]
        self.sinusoids.publish([per_branch(rows, branches) for rows in self.sinusoids(timestep)])
        for name, sinusoids in self.scalar_sinusoids.items():
            # Several numbers a sample the model embeds as one list, sample after sample.
            embedded = (per_branch(rows, branches) for rows in sinusoids(conditions[name]))
            sinusoids.publish([rows.flatten(0, -2) for rows in embedded])
        prediction = self.backbone(
            per_branch(sample * scale, branches),
            per_branch(timestep, branches),
            context.flatten(0, 1),
            context_mask.flatten(0, 1),
            canvas=None if canvas is None else canvas.flatten(0, 1),
            **{
                condition.name: conditions[condition.name].flatten(0, 1)
                if condition.per_branch
                else per_branch(conditions[condition.name], branches)
                for condition in self.conditions
            },
        )
        prediction = prediction.unflatten(0, (batch, branches))
        next_sample, next_history = self.update(prediction, guidance, coefficients, sample, history)
        next_sample = self._settled(next_sample, conditions)
        return (next_sample,) if next_history is None else (next_sample, next_history)

    def _settled(self, sample: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        shared = {c.name: conditions[c.name] for c in self.conditions if not c.per_branch}
        return self.backbone.backbone.settled(sample, **shared)

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Unit latents at timesteps from 1000 down; coefficients that let sample and prediction count alike."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            spec.name: torch.randn(shape_of(spec, extents), generator=generator)
            for spec in dict.fromkeys((*self.drawn, *self.inputs))
            if spec.dtype == "float32"
        }
        batch, branches, length = extents["B"], extents["G"], extents["L"]
        drawn["timestep"] = torch.linspace(987.5, 12.5, batch)
        scales = torch.tensor([4.5, -3.5, 0.25])[:branches] if branches > 1 else torch.ones(1)
        ramp = [] if drawn["guidance"].ndim == 2 else [1]
        drawn["guidance"] = scales.view(1, branches, *ramp).expand(drawn["guidance"].shape).contiguous()
        drawn |= self.backbone.backbone.condition_examples(self.backbone.model.config, drawn)
        drawn["coefficients"][:, 0] = torch.linspace(1.0, 0.5, batch)
        mask = right_padded_mask(batch * branches, length).unflatten(0, (batch, branches))
        return {spec.name: mask if spec.name == "context_mask" else drawn[spec.name] for spec in self.inputs}


def per_branch(tensor: Tensor, branches: int) -> Tensor:
    """Each sample once for every guidance branch: `[B, ...]` to `[B * branches, ...]`."""
    return tensor[:, None].expand(-1, branches, *(-1,) * (tensor.ndim - 1)).flatten(0, 1)
