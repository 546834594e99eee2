"""The weights that MetaCanvas adds to a planner and a backbone: what ``canvas.safetensors`` holds."""

from __future__ import annotations

from torch import nn

from mc_export.model.canvas_connector import CanvasConnector
from mc_export.model.config import MetaCanvasConfig
from mc_export.model.context_connector import ContextConnector, PooledConnector
from mc_export.model.planner import CanvasTokens


class CanvasModel(nn.Module):
    """Canvas tokens, canvas connector and, where the backbone's context comes from the planner, the context connector.

    Args:
        config: the checkpoint's ``metacanvas.json``.
        planner_dim: width of the planner's hidden states.
        backbone_dim: width of the backbone's patch-embedded latents.
        context_dim: width of the context the backbone takes.
        pooled_dim: width of the pooled vector the backbone takes beside it; None where it takes none.
    """

    def __init__(
        self, config: MetaCanvasConfig, planner_dim: int, backbone_dim: int, context_dim: int, pooled_dim: int | None = None
    ) -> None:
        super().__init__()
        self.canvas_tokens = CanvasTokens(config.canvas.grid, planner_dim)
        self.canvas_connector = CanvasConnector(
            planner_dim, backbone_dim, config.canvas_connector.plan_head_dim, config.canvas_connector.mlp_ratio
        )
        self.context_connector: ContextConnector | None = None
        self.pooled_connector: PooledConnector | None = None
        if config.conditioning == "planner":
            connector = config.context_connector
            self.context_connector = ContextConnector(planner_dim, context_dim, connector.hidden_dim, connector.dropout)
            if pooled_dim is not None:
                self.pooled_connector = PooledConnector(planner_dim, pooled_dim, dropout=connector.dropout)
