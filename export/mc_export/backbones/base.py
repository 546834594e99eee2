"""What the rest of the exporter needs to know of a backbone; each kind answers in one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class Backbone(ABC):
    """One kind of diffusion backbone.

    Attributes:
        name: short name, as in the manifest.
        model_classes: diffusers classes of the model, as in ``model_index.json``.
        component: the folder of the model in a pipeline directory, ``transformer`` or ``unet``.
        patch_embedding: the submodule after which the canvas is added.
        tasks: what the backbone can be asked for.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    component: ClassVar[str]
    patch_embedding: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    default_guidance: ClassVar[float]
    default_steps: ClassVar[int]

    @abstractmethod
    def width(self, config: Any) -> int:
        """Width of the patch-embedded latents: the canvas connector's output width."""

    @abstractmethod
    def context_width(self, config: Any) -> int:
        """Width of the context the model takes: the context connector's output width."""

    @abstractmethod
    def latent_channels(self, config: Any) -> int:
        """Channels of the latents."""

    @abstractmethod
    def patch(self, config: Any) -> tuple[int, int, int]:
        """Latent cells per token along (t, h, w)."""

    @abstractmethod
    def default_latent_size(self, config: Any) -> tuple[int, int]:
        """Latent (height, width) the model was made for."""

    @abstractmethod
    def timestep_scale(self, config: Any) -> float:
        """What the scheduler's timesteps are multiplied with before the model sees them."""

    @abstractmethod
    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        """The tokens of the noisy target as a grid ``[B, T, H, W, D]``, out of all that the patch embedding put out.

        ``sample`` is the noisy target itself: its sizes give the grid. Reference images and frames are left out.
        """

    @abstractmethod
    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        """``tokens`` with ``residual`` ``[B, T, H, W, D]`` added to those that :meth:`target_grid` took."""

    @abstractmethod
    def arguments(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Any
    ) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""

    @abstractmethod
    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        """The part of the model's output that the sampler takes (learned variances are dropped), of the sample's shape."""

    @abstractmethod
    def prepare_for_export(self, model: nn.Module) -> None:
        """Changes the model in place: what does not survive export, and what no step changes.

        Afterwards its context is what :meth:`context_preparation` gives; outputs stay the same.
        """

    @abstractmethod
    def prepared_context_width(self, config: Any) -> int:
        """Width of the prepared context ``[B, L, width]``."""

    @abstractmethod
    def context_preparation(self, model: nn.Module) -> nn.Module:
        """All that the published model computes from the context alone: ``[B, L, context_width]`` to the prepared context.

        The module keeps what it needs of ``model``; take it before :meth:`prepare_for_export`.
        """
