"""Context connector: the planner's states at the instruction's rows become the backbone's context (paper, 3.1 and D.1)."""

from __future__ import annotations

from torch import Tensor, nn


class ContextConnector(nn.Module):
    """Two linear layers with GELU(tanh) between them; dropout is a training matter and sits before the second.

    Args:
        input_dim: the planner's width.
        output_dim: the width the backbone takes as context.
        hidden_dim: the middle width; 4 x ``output_dim`` in the paper.
        dropout: probability in training (0.1 in the paper); no effect in evaluation.
    """

    def __init__(self, input_dim: int, output_dim: int, hidden_dim: int | None = None, dropout: float = 0.1) -> None:
        super().__init__()
        hidden_dim = hidden_dim or 4 * output_dim
        self.proj_in = nn.Linear(input_dim, hidden_dim)
        self.activation = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(hidden_dim, output_dim)

    def forward(self, states: Tensor) -> Tensor:
        """``[B, L, input_dim]`` to ``[B, L, output_dim]``."""
        projected: Tensor = self.proj_out(self.dropout(self.activation(self.proj_in(states))))
        return projected


class PooledConnector(ContextConnector):
    """The same MLP on the mean of the instruction's rows, for a backbone that takes a pooled vector beside its context.

    Ours: the paper does not say what takes the place of FLUX's and SDXL's pooled text embedding.
    """

    def of_rows(self, states: Tensor, mask: Tensor) -> Tensor:
        """Planner states ``[B, L, input_dim]`` with their mask ``[B, L]`` to ``[B, output_dim]``."""
        weights = mask.to(states.dtype)[..., None]
        mean = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        pooled: Tensor = self(mean)
        return pooled
