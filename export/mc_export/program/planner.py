"""The `planner` engine: reads the instruction, draws the canvas, and ends in what the backbone's steps take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mc_export.model.canvas_model import CanvasModel
from mc_export.model.lora import CanvasRows
from mc_export.model.planner import Planner
from mc_export.program.base import Axis, Extents, Program, float_tensor, int_tensor, right_padded_mask

_LANGUAGE_MODEL = "planner.qwen.language_model"


class PlannerProgram(Program):
    """Ids, mask and (t, h, w) positions of the instruction, and the canvas's positions, to `canvas` and `context`.

    `canvas` `[B, t, h, w, D]` comes after the vanilla block and its projection. `context` `[B, L, D_context]` is given only
    where the checkpoint conditions its backbone on the planner, and `pooled` `[B, P]` only where the backbone takes such a
    vector. A planner that sees takes `vision` `[N, D_planner]`, what the `vision` engine gave, and `vision_index` `[B, L]`,
    which of its rows stands at a token (-1: none).

    Args:
        planner: Qwen2.5-VL with the canvas tokens.
        canvas: connectors.
        width: of the canvas, the backbone's.
        context: what the backbone makes of the context before its first step (`Backbone.take_context`).
        context_dim: width of its result.
        max_length: the longest instruction, pictures included.
        max_batch: the largest batch.
        max_cells: the largest canvas extent along height and width.
        keyframes: of the canvas.
        max_vision: the most vision rows; 0 for a planner that reads text only.
    """

    component = "planner"

    def __init__(
        self,
        planner: Planner,
        canvas: CanvasModel,
        width: int,
        context: nn.Module | None,
        context_dim: int,
        *,
        max_length: int = 4096,
        max_batch: int = 64,
        max_cells: int = 128,
        keyframes: int = 1,
        max_vision: int = 0,
    ) -> None:
        super().__init__()
        self.planner = planner
        self.connector = canvas.canvas_connector
        self.context_connector = canvas.context_connector
        self.pooled_connector = canvas.pooled_connector
        self.context = context
        self.adaptable = {_LANGUAGE_MODEL: "planner.language_model"} | ({} if context is None else {"context": ""})
        self.keyframes = keyframes
        dim = planner.qwen.language_model.embed_tokens.embedding_dim
        self.sight = dim if max_vision else 0
        sight = (float_tensor("vision", "N", dim), int_tensor("vision_index", "B", "L")) if max_vision else ()
        self.inputs = (
            int_tensor("input_ids", "B", "L"),
            int_tensor("attention_mask", "B", "L"),
            int_tensor("position_ids", 3, "B", "L"),
            int_tensor("canvas_position_ids", 3, "B", keyframes, "h", "w"),
            *sight,
        )
        outputs = [float_tensor("canvas", "B", keyframes, "h", "w", width)]
        if self.context_connector is not None:
            outputs.append(float_tensor("context", "B", "L", context_dim))
        if self.pooled_connector is not None:
            outputs.append(float_tensor("pooled", "B", self.pooled_connector.proj_out.out_features))
        self.outputs = tuple(outputs)
        self.axes = {
            "B": Axis("B", 1, max(2, max_batch), 2),
            "L": Axis("L", 1, max(16, max_length), 9),
            "h": Axis("h", 1, max(8, max_cells), 4),
            "w": Axis("w", 1, max(8, max_cells), 3),
        }
        if sight:
            self.axes["N"] = Axis("N", 1, max(16, max_vision), 5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        canvas_position_ids: Tensor,
        vision: Tensor | None = None,
        vision_index: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        states = self.planner(input_ids, attention_mask, position_ids, canvas_position_ids, vision, vision_index)
        canvas = self.connector.draw(states.canvas)
        if self.context_connector is None:
            return (canvas,)
        context = self.context_connector(states.context)
        context = context if self.context is None else self.context(context)
        if self.pooled_connector is None:
            return canvas, context
        return canvas, context, self.pooled_connector.of_rows(states.context, attention_mask)

    def adapted_rows(self, path: str) -> CanvasRows | None:
        """The planner's LoRA acts on the canvas alone (paper, section 3.1)."""
        return self.planner.rows if path.startswith(_LANGUAGE_MODEL) else None

    def example(self, extents: Extents, seed: int = 0) -> dict[str, Tensor]:
        """Random ids in rows of different lengths, some of them vision rows; positions count up, the canvas's follow them."""
        generator = torch.Generator().manual_seed(seed)
        batch, length = extents["B"], extents["L"]
        mask = right_padded_mask(batch, length)
        vocabulary = self.planner.qwen.language_model.embed_tokens.num_embeddings
        ids = torch.randint(vocabulary // 2, (batch, length), generator=generator) * mask
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(extent) for extent in (self.keyframes, extents["h"], extents["w"])), indexing="ij")
        )
        starts = mask.sum(dim=1)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (torch.arange(length) * mask).expand(3, batch, length).contiguous(),
            "canvas_position_ids": grid[:, None] + starts[None, :, None, None, None],
        }
        if self.sight:
            inputs["vision"] = torch.randn(extents["N"], self.sight, generator=generator) * 0.1
            rows = torch.randint(-extents["N"], extents["N"], (batch, length), generator=generator)
            inputs["vision_index"] = torch.where(mask == 1, rows.clamp(min=-1), -1)
        return inputs
