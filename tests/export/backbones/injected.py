"""What holds for every backbone with a canvas, checked against a model's own call and against a loop in plain formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.model.canvas_connector import CanvasConnector, randomize_projections
from mc_export.model.injection import CanvasBackbone
from tests.factories import PLANNER_DIM

Feeds = Mapping[str, Tensor]


def check_zero_projections(
    backbone: Backbone, model: nn.Module, feeds: Feeds, published: Callable[[nn.Module], Tensor]
) -> None:
    """A fresh connector leaves the published model's output as it is, bit by bit, and its state dict's keys."""
    keys = set(model.state_dict())
    with torch.no_grad():
        expected = published(model)
        injected = CanvasBackbone(backbone, model, CanvasConnector(PLANNER_DIM, backbone.width(model.config)))(**feeds)
    assert torch.equal(injected, expected)
    assert set(model.state_dict()) == keys


def check_plain_loop(backbone: Backbone, make: Callable[[], nn.Module], feeds: Feeds, plain: Callable[..., Tensor]) -> None:
    """With random projections it equals `plain(model, connector, **feeds)`, as published and prepared for export."""
    model = make()
    connector = CanvasConnector(PLANNER_DIM, backbone.width(model.config)).eval()
    randomize_projections(connector, seed=13)
    prepared = CanvasBackbone(backbone, make(), connector)
    context = backbone.context_preparation(prepared.model)
    with torch.no_grad():
        expected = plain(model, connector, **feeds)
        torch.testing.assert_close(prepared(**feeds), expected, atol=2e-5, rtol=1e-4)
        backbone.prepare_for_export(prepared.model)
        states = context(feeds["context"])
        assert states.shape[-1] == backbone.prepared_context_width(prepared.model.config)
        actual = prepared(**{**feeds, "context": states})
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
