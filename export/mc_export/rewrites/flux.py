"""FLUX's blocks, double and single stream, by the operators of `mc_kernels`, as one stack.

    q, k, v = u W^T                              one product, in single blocks with the feed-forward network's too
    q, k    = qk_norm_rope(q, k, ...)            RMS norm of every head, rotary positions
    y       = softmax(q k^T) v W_o
    h, u    = gated_residual_norm(h, y, ...)     the residual that ends one half, the norm and modulation that open the next

Single blocks have one norm each, so that only the next block's follows a residual; hence one module for all blocks. It also
joins the two streams once, where the published blocks join and part them in every single block, and takes the SiLU of the
embedding once, not in every norm. No module that is handed the angles has parameters of its own, so that a precision below
float32 leaves them alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from mc_export.rewrites.counts import Counts, check_blocks
from mc_export.rewrites.parts import Stream, merged_linear
from mc_kernels.qk_norm_rope import qk_norm_rope

Angles = tuple[Tensor, Tensor]


def use_flux_kernels(model: Any) -> Counts:
    """Rewrites the blocks of a prepared `FluxTransformer2DModel` in place.

    Raises:
        EngineError: a block was not matched.
    """
    double, single = model.transformer_blocks, model.single_transformer_blocks
    check_blocks(double, FluxTransformerBlock, int(model.config.num_layers))
    check_blocks(single, FluxSingleTransformerBlock, int(model.config.num_single_layers))
    # Where a stream's norm follows a residual: two of each stream's a double block but for the first, one a single block.
    norms = 2 * max(0, 2 * len(double) - 1) + max(0, len(single) - 1)
    rotations = 2 * len(double) + len(single)
    model.transformer_blocks = nn.ModuleList([KernelStack(double, single)])
    model.single_transformer_blocks = nn.ModuleList()
    return {"gated_residual_norm": norms, "qk_norm_rope": rotations}


class KernelStack(nn.Module):
    """All blocks, called as one `FluxTransformerBlock`."""

    def __init__(self, double: nn.ModuleList, single: nn.ModuleList) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock(block) for block in double)
        self.single_blocks = nn.ModuleList(SingleBlock(block) for block in single)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[N, S, D]` of picture and text, the embedding `[N, D]`, angles `[S, d / 2]`, text before picture."""
        mask = (joint_attention_kwargs or {}).get("attention_mask")
        emb, rows = F.silu(temb), encoder_hidden_states.shape[1]
        text, image = Stream(encoder_hidden_states.contiguous()), Stream(hidden_states.contiguous())
        for block in self.double_blocks:
            text, image = block(text, image, emb, image_rotary_emb, mask)
        joined = Stream(torch.cat([text.settled(), image.settled()], dim=1))
        for block in self.single_blocks:
            joined = block(joined, emb, image_rotary_emb, mask)
        tokens = joined.settled()
        return tokens[:, :rows], tokens[:, rows:]


class DoubleBlock(nn.Module):
    """A `FluxTransformerBlock`: text and picture apart, but for the attention."""

    def __init__(self, block: FluxTransformerBlock) -> None:
        super().__init__()
        attn = block.attn
        self.image = Half(
            block.norm1, [attn.to_q, attn.to_k, attn.to_v], [attn.norm_q, attn.norm_k], attn.to_out[0], block.norm2, block.ff
        )
        self.text = Half(
            block.norm1_context, [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], [attn.norm_added_q, attn.norm_added_k],
            attn.to_add_out, block.norm2_context, block.ff_context,
        )  # fmt: skip

    def forward(self, text: Stream, image: Stream, emb: Tensor, angles: Angles, mask: Tensor | None) -> tuple[Stream, Stream]:
        rows = text.h.shape[1]
        h_text, of_text, text_heads = self.text.heads(text, emb, (angles[0][:rows], angles[1][:rows]))
        h_image, of_image, image_heads = self.image.heads(image, emb, (angles[0][rows:], angles[1][rows:]))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text_heads, image_heads, strict=True))
        attended = _attended(query, key, value, mask)
        text = self.text.fed(h_text, attended[:, :rows], of_text)
        return text, self.image.fed(h_image, attended[:, rows:], of_image)


class Half(nn.Module):
    """What text or picture have of their own in a double block."""

    def __init__(
        self, opening: Any, projections: list[nn.Linear], norms: list[Any], out: nn.Module, norm: Any, ff: Any
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.modulation = opening.norm, norm, opening.linear
        self.projections = merged_linear(projections)
        self.norm_q, self.norm_k = norms
        self.out, self.ff = out, ff

    def heads(self, stream: Stream, emb: Tensor, angles: Angles) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The stream's sum, what modulates it (`[N, 1, D]` each), and normed, rotated heads `[N, S, heads, d]`."""
        shift, scale, *later = self.modulation(emb)[:, None].chunk(6, dim=-1)
        h, u = stream.opened(self.norm1, shift, scale)
        return h, tuple(later), _heads(self.projections(u), self.norm_q, self.norm_k, angles)

    def fed(self, h: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Stream:
        """The rest of the block."""
        gate, shift, scale, gate_ff = modulation
        h, u = Stream(h, self.out(attended), gate).opened(self.norm2, shift, scale)
        return Stream(h, self.ff(u), gate_ff)


class SingleBlock(nn.Module):
    """A `FluxSingleTransformerBlock`: attention and feed-forward network side by side, in and out of one product each."""

    def __init__(self, block: FluxSingleTransformerBlock) -> None:
        super().__init__()
        attn = block.attn
        self.norm, self.modulation = block.norm.norm, block.norm.linear
        self.widths = (3 * attn.inner_dim, block.mlp_hidden_dim)
        self.projections = merged_linear([attn.to_q, attn.to_k, attn.to_v, block.proj_mlp])
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.activation, self.out = block.act_mlp, block.proj_out

    def forward(self, joined: Stream, emb: Tensor, angles: Angles, mask: Tensor | None) -> Stream:
        shift, scale, gate = self.modulation(emb)[:, None].chunk(3, dim=-1)
        h, u = joined.opened(self.norm, shift, scale)
        projected, mixed = self.projections(u).split(self.widths, dim=-1)
        query, key, value = _heads(projected, self.norm_q, self.norm_k, angles)
        return Stream(h, self.out(torch.cat([_attended(query, key, value, mask), self.activation(mixed)], dim=-1)), gate)


def _heads(projected: Tensor, norm_q: Any, norm_k: Any, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Merged projections `[N, S, 3 * D]` to queries and keys, normed and rotated, and values: `[N, S, heads, d]`."""
    query, key, value = projected.unflatten(-1, (3, -1, norm_q.weight.shape[0])).unbind(2)
    query, key = qk_norm_rope(query, key, norm_q.weight, norm_k.weight, *angles, norm_q.eps)
    return query, key, value


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`[N, S, heads, d]` to `[N, S, heads * d]`."""
    heads = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
