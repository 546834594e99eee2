"""The `vision` engine: Qwen2.5-VL's vision tower for any pictures and clips; all that depends on grids is made outside.

Attention gathers the patches of every window, or of every frame, into a batch, and puts the results back: windows cost
`patches x window`, frames `patches x frame`, and the borders' smaller windows are filled up and masked. Patches stay in the
order of the token sequence; transformers' own permutation by windows and back is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from mc_export.program.base import Axis, Extents, Program, float_tensor, int_tensor
from mc_runtime.errors import CheckpointError


class VisionProgram(Program):
    """Patches, their positions and their neighbours to the embeddings `vision` `[N, D]` for the planner's sequence.

    Inputs are those of :func:`mc_runtime.prompting.vision.tower_inputs`, with N tokens of p patches, V windows of at most P
    patches and F frames of at most R.

    Args:
        tower: transformers' `Qwen2_5_VisionTransformerPretrainedModel`.
        max_tokens: the most tokens at once.
    """

    component = "vision"

    def __init__(self, tower: Any, *, max_tokens: int = 16384) -> None:
        super().__init__()
        config = tower.config
        side = config.window_size // config.patch_size // config.spatial_merge_size
        if side < 1:
            raise CheckpointError(f"planner/config.json: vision_config.window_size, {config.window_size}, is less than a token")
        self.tower = tower
        self.unit = config.spatial_merge_size**2
        self.window = side * side * self.unit
        self.in_frames = frozenset(config.fullatt_block_indexes)
        self.inputs = (
            float_tensor("pixels", "N", self.unit, config.in_channels * config.temporal_patch_size * config.patch_size**2),
            int_tensor("positions", "N", self.unit, 2),
            int_tensor("windows", "V", self.window),
            int_tensor("window_places", "N", self.unit),
            int_tensor("frames", "F", "R"),
            int_tensor("frame_places", "N", self.unit),
        )
        self.outputs = (float_tensor("vision", "N", config.out_hidden_size),)
        most = max(64, max_tokens)
        self.axes = {
            "N": Axis("N", 1, most, 13),
            "V": Axis("V", 1, most, 3),
            "F": Axis("F", 1, most, 2),
            "R": Axis("R", 1, self.unit * most, 28),
        }

    def forward(
        self,
        pixels: Tensor,
        positions: Tensor,
        windows: Tensor,
        window_places: Tensor,
        frames: Tensor,
        frame_places: Tensor,
    ) -> Tensor:
        tower = self.tower
        # Rows stay [N, p, D]: products of two dimensions alone become an operator that quantizers pass over.
        # The patch embedding's kernel is a whole patch: a matrix product.
        kernel = tower.patch_embed.proj.weight.flatten(1)
        states = F.linear(pixels.to(kernel.dtype), kernel)
        rotation = tower.rotary_pos_emb(states, positions.flatten(0, 1))
        within_windows, within_frames = (windows, window_places), (frames, frame_places)
        for index, block in enumerate(tower.blocks):
            groups, places = within_frames if index in self.in_frames else within_windows
            states = states + _attention(block.attn, block.norm1(states), rotation, groups, places)
            states = states + block.mlp(block.norm2(states))
        merged = tower.merger.ln_q(states).flatten(1)
        # Not `[0]`: OpenVINO drops that selection behind an int8 product, and a dimension more comes out.
        embeddings: Tensor = tower.merger.mlp(merged[None]).flatten(0, 1)
        return embeddings

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Normalised patches at random; every group has at least one patch, and its last places may be empty."""
        generator = torch.Generator().manual_seed(seed)
        tokens, patches = extents["N"], extents["N"] * self.unit

        def drawn(most: int, *shape: int) -> Tensor:
            return torch.randint(most, shape, generator=generator)

        def groups(count: int, width: int) -> Tensor:
            empty = torch.arange(width) >= width - drawn(max(1, width // 2), count, 1)
            return drawn(patches, count, width).masked_fill(empty, -1)

        return {
            "pixels": torch.randn(tokens, self.unit, self.inputs[0].shape[2], generator=generator),
            "positions": drawn(64, tokens, self.unit, 2),
            "windows": groups(extents["V"], self.window),
            "window_places": drawn(extents["V"] * self.window, tokens, self.unit),
            "frames": groups(extents["F"], extents["R"]),
            "frame_places": drawn(extents["F"] * extents["R"], tokens, self.unit),
        }


def _attention(attention: nn.Module, states: Tensor, rotation: tuple[Tensor, Tensor], groups: Tensor, places: Tensor) -> Tensor:
    """Attention within groups of patches.

    Args:
        attention: `Qwen2_5_VLVisionAttention`, for its two projections.
        states: `[N, p, D]`, every patch.
        rotation: cosines and sines, `[N * p, head width]`.
        groups: `[G, m]` patches of each group; negative where it ends.
        places: `[N, p]`, where in the flattened groups a patch's result is.
    """
    module: Any = attention
    query, key, value = module.qkv(states).flatten(0, 1).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotation)
    rows = groups.clamp(min=0)
    query, key, value = (tensor[rows].transpose(1, 2) for tensor in (query, key, value))
    mask = (groups >= 0)[:, None, None, :]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=module.scaling)
    attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
    projected: Tensor = module.proj(attended[places])
    return projected
