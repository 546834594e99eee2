"""Adds the canvas after a backbone's patch embedding without copying the backbone's forward.

A forward hook, registered once, reads the plan, the timestep and the sample from non-persistent buffers that
``torch.func.functional_call`` fills for one call. State-dict keys stay those of the published model, and it passes
``torch.export`` and ``torch.compile(fullgraph=True)``; a hook registered inside forward, or a context variable, does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.model.canvas_connector import CanvasConnector

CANVAS_BUFFER = "metacanvas_canvas"
TIMESTEP_BUFFER = "metacanvas_timestep"
SAMPLE_BUFFER = "metacanvas_sample"
CLEAN_BUFFER = "metacanvas_clean_frames"


class CanvasBackbone(nn.Module):
    """A diffusers backbone that takes a canvas.

    Args:
        backbone: what is known of the backbone's kind: where the canvas enters, how its forward is called.
        model: the diffusers model; it keeps its own weights, keys and forward.
        connector: the canvas connector, or None for a stock checkpoint.
    """

    def __init__(self, backbone: Backbone, model: nn.Module, connector: CanvasConnector | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = model
        self.connector = connector
        backbone.adopt(model)
        if connector is not None:
            patch_embedding = model.get_submodule(backbone.patch_embedding)
            for name in (CANVAS_BUFFER, TIMESTEP_BUFFER, SAMPLE_BUFFER, CLEAN_BUFFER):
                patch_embedding.register_buffer(name, None, persistent=False)
            patch_embedding.register_forward_hook(self._inject)

    def _inject(self, patch_embedding: nn.Module, _inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        canvas = getattr(patch_embedding, CANVAS_BUFFER)
        if canvas is None:
            return tokens
        assert self.connector is not None
        grid = self.backbone.target_grid(tokens, getattr(patch_embedding, SAMPLE_BUFFER), self.model.config)
        timestep, clean = (getattr(patch_embedding, name) for name in (TIMESTEP_BUFFER, CLEAN_BUFFER))
        residual = self.connector.residual(grid, canvas, timestep, clean)
        return self.backbone.add_to_target(tokens, residual)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor,
        canvas: Tensor | None = None,
        **conditions: Tensor,
    ) -> Tensor:
        """One prediction of the backbone.

        Args:
            sample: model input ``[B, C, H, W]`` (video: ``[B, C, T, H, W]``).
            timestep: ``[B]``, in the backbone's own units.
            context: ``[B, L, D_context]``.
            context_mask: ``[B, L]``, how often a row counts: 0 where it is padding.
            canvas: ``[B, t, h, w, D]`` from :meth:`CanvasConnector.draw`; None leaves the backbone as published.
            conditions: further inputs of the backbone's kind (`Backbone.conditions`), a row a sample.

        Returns:
            The prediction, of the sample's shape.
        """
        arguments = self.backbone.arguments(self.model, sample, timestep, context, context_mask, **conditions)
        if canvas is None:
            output = self.model(**arguments, return_dict=False)[0]
        else:
            if self.connector is None:
                raise ValueError("a canvas was given, but this checkpoint has no canvas connector")
            if not hasattr(self.model.get_submodule(self.backbone.patch_embedding), CANVAS_BUFFER):
                # What hung on the first one, it would never enter, and nobody would be told.
                raise ValueError(f"{self.backbone.patch_embedding} was replaced by a layer behind which no canvas enters")
            clean = self.backbone.clean_frames(sample, **conditions)
            given = {CANVAS_BUFFER: canvas, TIMESTEP_BUFFER: timestep, SAMPLE_BUFFER: sample, CLEAN_BUFFER: clean}
            buffers = {
                f"{self.backbone.patch_embedding}.{name}": tensor for name, tensor in given.items() if tensor is not None
            }
            arguments["return_dict"] = False
            output = torch.func.functional_call(self.model, buffers, args=(), kwargs=arguments)[0]
        return self.backbone.prediction(output, sample)
