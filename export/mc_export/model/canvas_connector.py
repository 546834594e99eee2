"""Canvas connector: the plan as a residual of the backbone's patch-embedded latents (paper, section 3.4, Algorithm 1)."""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from mc_export.model.interpolation import resize_grid

DIT_HEAD_DIM = 32  # SANA's linear attention, and the paper's choice for the connector


def zero_linear(input_dim: int, output_dim: int) -> nn.Linear:
    """A linear layer that is zero at initialisation, so that a fresh connector leaves its backbone unchanged."""
    layer = nn.Linear(input_dim, output_dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class CanvasPlanBlock(nn.Module):
    """The request-only half: planner width to backbone width, one vanilla transformer block, a zero-initialised projection."""

    def __init__(self, planner_dim: int, backbone_dim: int, head_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(planner_dim, backbone_dim)
        self.block = BasicTransformerBlock(
            backbone_dim,
            num_attention_heads=backbone_dim // head_dim,
            attention_head_dim=head_dim,
            activation_fn="gelu-approximate",
            attention_bias=True,
        )
        self.proj_out = zero_linear(backbone_dim, backbone_dim)

    def forward(self, canvas_states: Tensor) -> Tensor:
        """Canvas states ``[B, N, planner_dim]`` to the drawn plan ``[B, N, backbone_dim]``."""
        return cast(Tensor, self.proj_out(self.block(self.proj_in(canvas_states))))


class CanvasStepBlock(nn.Module):
    """The per-step half: one SANA block on ``patch_embed(z_t) + canvas``, modulated by the timestep, then a zero projection.

    ``SanaTransformerBlock`` without cross-attention never creates ``attn2`` and ``norm2`` yet uses both in its forward, hence
    the two assignments below; its second norm has no weights, so the state dict is the published one.
    """

    def __init__(self, backbone_dim: int, mlp_ratio: float = 2.5) -> None:
        super().__init__()
        self.time_embed = AdaLayerNormSingle(backbone_dim)
        self.block = SanaTransformerBlock(
            dim=backbone_dim,
            num_attention_heads=backbone_dim // DIT_HEAD_DIM,
            attention_head_dim=DIT_HEAD_DIM,
            num_cross_attention_heads=None,
            cross_attention_head_dim=None,
            cross_attention_dim=None,
            attention_bias=False,
            mlp_ratio=mlp_ratio,
        )
        self.block.attn2 = None
        self.block.norm2 = nn.LayerNorm(backbone_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = zero_linear(backbone_dim, backbone_dim)
        self.register_buffer("clean_sinusoids", self.time_embed.emb.time_proj(torch.zeros(1)), persistent=False)

    def modulation(self, timestep: Tensor, frames: int, clean: Tensor | None, dtype: torch.dtype) -> Tensor:
        """AdaLN-single's numbers for every frame, ``[B, frames, 6 * D]``.

        Args:
            timestep: ``[B]``, the step's.
            frames: of the clip.
            clean: ``[B, frames]``, 1 where a frame is at timestep 0 instead; None where none is.
            dtype: of the tokens.
        """
        at_step, _ = self.time_embed(timestep, batch_size=timestep.shape[0], hidden_dtype=dtype)
        at_step = at_step[:, None].expand(-1, frames, -1)
        if clean is None:
            return cast(Tensor, at_step)
        embedding = self.time_embed.emb.timestep_embedder(self.get_buffer("clean_sinusoids").to(dtype))
        at_zero = self.time_embed.linear(self.time_embed.silu(embedding))
        return torch.where(clean[..., None] > 0, at_zero, at_step)

    def forward(self, tokens: Tensor, modulation: Tensor, height: int, width: int) -> Tensor:
        """Fused tokens of single frames ``[F, height * width, D]``, each with its row of `modulation` ``[F, 6 * D]``, to a
        residual of the same shape."""
        hidden = self.block(tokens, timestep=modulation, height=height, width=width)
        return cast(Tensor, self.proj_out(hidden))


class CanvasConnector(nn.Module):
    """Both halves of the connector.

    Args:
        planner_dim: width of the planner's hidden states.
        backbone_dim: width of the backbone's patch-embedded latents; a multiple of 32 and of ``plan_head_dim``.
        plan_head_dim: head width of the vanilla block.
        mlp_ratio: expansion of the DiT block's Mix-FFN.
    """

    def __init__(self, planner_dim: int, backbone_dim: int, plan_head_dim: int = 32, mlp_ratio: float = 2.5) -> None:
        super().__init__()
        for name, head_dim in (("plan_head_dim", plan_head_dim), ("the DiT block's head width", DIT_HEAD_DIM)):
            if backbone_dim % head_dim:
                raise ValueError(f"backbone width {backbone_dim} is no multiple of {name} {head_dim}")
        self.plan_block = CanvasPlanBlock(planner_dim, backbone_dim, plan_head_dim)
        self.step_block = CanvasStepBlock(backbone_dim, mlp_ratio)

    def draw(self, canvas_states: Tensor) -> Tensor:
        """Canvas states ``[B, t, h, w, planner_dim]`` to the plan ``[B, t, h, w, backbone_dim]``; once a request."""
        b, t, h, w, d = canvas_states.shape
        return self.plan_block(canvas_states.reshape(b, t * h * w, d)).unflatten(1, (t, h, w))

    def residual(self, tokens: Tensor, canvas: Tensor, timestep: Tensor, clean: Tensor | None = None) -> Tensor:
        """What is added to the patch-embedded latents; once a step.

        Args:
            tokens: ``patch_embed(z_t)`` on its grid, ``[B, T, H, W, D]``.
            canvas: the plan ``[B, t, h, w, D]``, interpolated here to the latent grid.
            timestep: ``[B]``, the step's.
            clean: ``[B, T]``, 1 where a frame is at timestep 0 instead; None where none is.

        Returns:
            ``[B, T, H, W, D]``. Batch and frames fold together: attention never crosses frames (D.1).
        """
        b, t, h, w, d = tokens.shape
        fused = tokens + resize_grid(canvas, (t, h, w)).to(tokens.dtype)
        modulation = self.step_block.modulation(timestep, t, clean, tokens.dtype)
        residual = self.step_block(fused.reshape(b * t, h * w, d), modulation.reshape(b * t, 6 * d), h, w)
        return residual.reshape(b, t, h, w, d)


def randomize_projections(connector: CanvasConnector, seed: int, std: float = 0.5) -> None:
    """Gives the zero-initialised projections random weights, so that parity checks cannot pass by the connector being off."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (connector.plan_block.proj_out, connector.step_block.proj_out):
        scale = std / layer.in_features**0.5
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * scale)
