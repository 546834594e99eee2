"""FLUX's blocks, double and single stream, by the operators of `mc_kernels`, as one stack.

    q, k, v = u W^T                              one product, in single blocks with the feed-forward network's too
    q, k    = qk_norm_rope(q, k, ...)            RMS norm of every head, rotary positions
    y       = softmax(q k^T) v W_o
    h, u    = gated_residual_norm(h, y, ...)     the residual that ends one half, the norm and modulation that open the next

Single blocks have one norm each, so that only the next block's follows a residual; hence one module for all blocks. It also
joins the two streams once, where the published blocks join and part them in every single block, and takes the SiLU of the
embedding once, not in every norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from mc_export.rewrites.counts import Counts, check_blocks
from mc_export.rewrites.parts import merged_linear, norm_modulated
from mc_kernels.gated_residual_norm import gated_residual_norm
from mc_kernels.qk_norm_rope import qk_norm_rope

Angles = tuple[Tensor, Tensor]
Heads = tuple[Tensor, Tensor, Tensor]


def use_flux_kernels(model: Any) -> Counts:
    """Rewrites the blocks of a prepared `FluxTransformer2DModel` in place.

    Raises:
        EngineError: a block was not matched.
    """
    double, single = model.transformer_blocks, model.single_transformer_blocks
    check_blocks(double, FluxTransformerBlock, int(model.config.num_layers))
    check_blocks(single, FluxSingleTransformerBlock, int(model.config.num_single_layers))
    # Where each stream's norms follow a residual: two a double block but for the first, one a single block but for the first.
    norms = 2 * max(0, 2 * len(double) - 1) + max(0, len(single) - 1)
    rotations = 2 * len(double) + len(single)
    model.transformer_blocks = nn.ModuleList([KernelStack(double, single)])
    model.single_transformer_blocks = nn.ModuleList()
    return {"gated_residual_norm": norms, "qk_norm_rope": rotations}


class KernelStack(nn.Module):
    """All blocks, called as one `FluxTransformerBlock`.

    It has no parameters of its own, so that a precision below float32 leaves the angles it is given alone.
    """

    def __init__(self, double: nn.ModuleList, single: nn.ModuleList) -> None:
        super().__init__()
        self.doubles = nn.ModuleList(DoubleBlock(block) for block in double)
        self.singles = nn.ModuleList(SingleBlock(block) for block in single)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Angles,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens `[N, S, D]` of text and picture, the embedding `[N, D]`, angles `[S, d]` (each twice), text before picture."""
        mask = (joint_attention_kwargs or {}).get("attention_mask")
        emb = F.silu(temb)
        cos, sin = (table[:, ::2].contiguous() for table in image_rotary_emb)  # read by every block
        rows = encoder_hidden_states.shape[1]
        text, image = encoder_hidden_states.contiguous(), hidden_states.contiguous()
        if len(self.doubles):
            text, image = self._double_stream(text, image, emb, (cos, sin), mask)
        if len(self.singles):
            joined = self._single_stream(torch.cat([text, image], dim=1), emb, (cos, sin), mask)
            text, image = joined[:, :rows], joined[:, rows:]
        return text, image

    def _double_stream(
        self, text: Tensor, image: Tensor, emb: Tensor, angles: Angles, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        modulations = [(block.text.modulation(emb), block.image.modulation(emb)) for block in self.doubles]
        block, (of_text, of_image) = self.doubles[0], modulations[0]
        u_text, u_image = block.text.opened(text, *of_text[:2]), block.image.opened(image, *of_image[:2])
        for index, block in enumerate(self.doubles):
            of_text, of_image = modulations[index]
            y_text, y_image = block(u_text, u_image, angles, mask)
            text, u_text = gated_residual_norm(text, y_text, *of_text[2:5], block.text.eps[1])
            image, u_image = gated_residual_norm(image, y_image, *of_image[2:5], block.image.eps[1])
            y_text, y_image = block.text.ff(u_text), block.image.ff(u_image)
            if index + 1 == len(self.doubles):
                break
            following, (next_text, next_image) = self.doubles[index + 1], modulations[index + 1]
            text, u_text = gated_residual_norm(text, y_text, of_text[5], *next_text[:2], following.text.eps[0])
            image, u_image = gated_residual_norm(image, y_image, of_image[5], *next_image[:2], following.image.eps[0])
        return text + of_text[5] * y_text, image + of_image[5] * y_image

    def _single_stream(self, joined: Tensor, emb: Tensor, angles: Angles, mask: Tensor | None) -> Tensor:
        modulations = [block.modulation(emb) for block in self.singles]
        shift, scale, gate = modulations[0]
        u = norm_modulated(self.singles[0].norm, joined, shift, scale)
        for index, block in enumerate(self.singles):
            gate = modulations[index][2]
            y = block(u, angles, mask)
            if index + 1 == len(self.singles):
                break
            shift, scale, _ = modulations[index + 1]
            joined, u = gated_residual_norm(joined, y, gate, shift, scale, self.singles[index + 1].norm.eps)
        return joined + gate * y


class Stream(nn.Module):
    """One of a double block's two streams: its modulation, projections and feed-forward network."""

    def __init__(
        self, opening: Any, projections: list[nn.Linear], norms: list[Any], out: nn.Module, norm: Any, ff: Any
    ) -> None:
        super().__init__()
        self.opening, self.eps = opening.norm, (opening.norm.eps, norm.eps)
        self.embedding = opening.linear
        self.projections = merged_linear(projections)
        self.norm_q, self.norm_k = norms
        self.out, self.ff = out, ff

    def modulation(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate `[N, 1, D]` of the attention, then of the feed-forward network."""
        return self.embedding(emb)[:, None].chunk(6, dim=-1)

    def opened(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """The first block's norm and modulation, which follow no residual."""
        return norm_modulated(self.opening, h, shift, scale)

    def heads(self, u: Tensor, width: int, angles: Angles) -> Heads:
        """Normed and rotated queries and keys, and values, `[N, S, heads, width]`."""
        query, key, value = self.projections(u).unflatten(-1, (3, -1, width)).unbind(2)
        query, key = qk_norm_rope(query, key, self.norm_q.weight, self.norm_k.weight, *angles, self.norm_q.eps)
        return query, key, value


class DoubleBlock(nn.Module):
    """A `FluxTransformerBlock`'s attention over both streams, and what each stream has of its own."""

    def __init__(self, block: FluxTransformerBlock) -> None:
        super().__init__()
        attn = block.attn
        self.width = attn.head_dim
        self.image = Stream(
            block.norm1, [attn.to_q, attn.to_k, attn.to_v], [attn.norm_q, attn.norm_k], attn.to_out[0], block.norm2, block.ff
        )
        self.text = Stream(
            block.norm1_context, [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj], [attn.norm_added_q, attn.norm_added_k],
            attn.to_add_out, block.norm2_context, block.ff_context,
        )  # fmt: skip

    def forward(self, u_text: Tensor, u_image: Tensor, angles: Angles, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is attended to, for text and picture, after the output projections."""
        rows = u_text.shape[1]
        text = self.text.heads(u_text, self.width, (angles[0][:rows], angles[1][:rows]))
        image = self.image.heads(u_image, self.width, (angles[0][rows:], angles[1][rows:]))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        attended = _attended(query, key, value, mask)
        return self.text.out(attended[:, :rows]), self.image.out(attended[:, rows:])


class SingleBlock(nn.Module):
    """A `FluxSingleTransformerBlock`: attention and feed-forward network side by side, in and out of one product each."""

    def __init__(self, block: FluxSingleTransformerBlock) -> None:
        super().__init__()
        attn = block.attn
        self.norm, self.embedding = block.norm.norm, block.norm.linear
        self.width, self.inner = attn.head_dim, attn.inner_dim
        self.projections = merged_linear([attn.to_q, attn.to_k, attn.to_v, block.proj_mlp])
        self.norm_q, self.norm_k = attn.norm_q, attn.norm_k
        self.activation, self.out = block.act_mlp, block.proj_out

    def modulation(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, `[N, 1, D]`."""
        return self.embedding(emb)[:, None].chunk(3, dim=-1)

    def forward(self, u: Tensor, angles: Angles, mask: Tensor | None) -> Tensor:
        projected = self.projections(u)
        attended, mixed = projected.split([3 * self.inner, projected.shape[-1] - 3 * self.inner], dim=-1)
        query, key, value = attended.unflatten(-1, (3, -1, self.width)).unbind(2)
        query, key = qk_norm_rope(query, key, self.norm_q.weight, self.norm_k.weight, *angles, self.norm_q.eps)
        result: Tensor = self.out(torch.cat([_attended(query, key, value, mask), self.activation(mixed)], dim=-1))
        return result


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """`[N, S, heads, d]` to `[N, S, heads * d]`."""
    heads = (states.transpose(1, 2) for states in (query, key, value))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
