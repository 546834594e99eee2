"""What the rest of the exporter needs to know of a backbone; each kind answers in one file of this folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from mc_export.backbones.spec import Condition, EncoderFolders, Limit, TextStates, TextTokens
from mc_export.backbones.stream import BlockStream
from mc_export.program.base import Axis
from mc_export.sampler import SetTimesteps, dynamic_shift_timesteps
from mc_runtime.bundle.manifest import Prompting


class Backbone(ABC):
    """One kind of diffusion backbone.

    Latents are `[B, C, H, W]`, those of a video `[B, C, T, H, W]`, whatever the model's own layout.

    Attributes:
        name: short name, as in the manifest.
        model_classes: diffusers classes of the model, as in ``model_index.json``.
        pipelines: diffusers classes of the pipelines, where the model's class is that of several kinds; empty: any.
        component: the folder of the model in a pipeline directory, ``transformer`` or ``unet``.
        patch_embedding: the submodule after which the canvas is added.
        tasks: what a stock checkpoint can be asked for.
        canvas_tasks: what a MetaCanvas checkpoint can be asked for; see also :meth:`task_refusal`.
        limits: what its engines cannot be built in, or would not serve in.
        encoders: the text encoders a stock checkpoint keeps.
        unsupported_components: parts of a pipeline that make it one this backbone cannot run, each with the reason.
        selects_rows: whether only some rows of the encoders' states become context.
        config_names_size: whether the model's configuration says what size it was made for.
        image_encoder: the folder of the vision model whose embedding of a picture is a stock checkpoint's context; None: text.
        encoders_share_length: whether the encoders' states lie side by side, so that all sequences must be equally long.
        latent_axes: the latents' dynamic dimensions, behind the channels.
        default_frames: pixel frames of a video when the request names none; None for pictures.
        default_fps: of a video.
        guidance_branches: predictions that guidance weighs at most; 1 where there is no negative prompt.
        embeds_guidance: whether the model takes the guidance scale as an input; a second branch then has a scale of its own.
        guidance_ramp_from: guidance scale of a video's first frame, rising to the request's at the last one; None: one for all.
        prepares_layers: whether `context_preparation` holds layers of the model's blocks, which a LoRA may adapt.
        scales_encoded: whether it takes encoded pictures in the scale of its latents, or as the autoencoder gives them.
        stream: what passes between its blocks, so that a step can be cut behind the first one; None where it cannot.
        uncut: why it cannot, in one clause.
    """

    name: ClassVar[str]
    model_classes: ClassVar[tuple[str, ...]]
    pipelines: ClassVar[tuple[str, ...]] = ()
    component: ClassVar[str]
    patch_embedding: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    canvas_tasks: ClassVar[tuple[str, ...]]
    limits: ClassVar[tuple[Limit, ...]] = ()
    default_guidance: ClassVar[float]
    default_steps: ClassVar[int]
    encoders: ClassVar[tuple[EncoderFolders, ...]] = ()
    unsupported_components: ClassVar[Mapping[str, str]] = MappingProxyType({})
    selects_rows: ClassVar[bool] = False
    config_names_size: ClassVar[bool] = True
    image_encoder: ClassVar[str | None] = None
    encoders_share_length: ClassVar[bool] = False
    latent_axes: ClassVar[tuple[str, ...]] = ("H", "W")
    default_frames: ClassVar[int | None] = None
    default_fps: ClassVar[float] = 24.0
    guidance_branches: ClassVar[int] = 2
    embeds_guidance: ClassVar[bool] = False
    guidance_ramp_from: ClassVar[float | None] = None
    prepares_layers: ClassVar[bool] = True
    scales_encoded: ClassVar[bool] = True
    stream: ClassVar[BlockStream | None] = None
    uncut: ClassVar[str] = ""

    def weighs_branches(self, scale: float) -> bool:
        """Whether guidance of this scale needs a prediction for the negative prompt, too."""
        return scale > 1 and self.guidance_branches > 1 and not self.embeds_guidance

    def refusal(self, config: Any) -> str | None:
        """Why a model of this configuration is not supported, in one line; None where it is."""
        return None

    def task_refusal(self, config: Any, task: str) -> str | None:
        """Why a MetaCanvas checkpoint of a model of this configuration cannot do a task, in one line; None where it can."""
        if task in self.canvas_tasks:
            return None
        return f"{self.name} cannot do {task}; it can do {', '.join(self.canvas_tasks)}"

    @abstractmethod
    def width(self, config: Any) -> int:
        """Width of the patch-embedded latents: the canvas connector's output width."""

    @abstractmethod
    def context_width(self, config: Any) -> int:
        """Width of the context the model takes: the context connector's output width."""

    def pooled_width(self, config: Any) -> int | None:
        """Width of the pooled vector the model takes beside its context; None where it takes none."""
        return None

    @abstractmethod
    def latent_channels(self, config: Any) -> int:
        """Channels of the latents."""

    @abstractmethod
    def patch(self, config: Any) -> tuple[int, int, int]:
        """Latent cells per token along (t, h, w)."""

    def size_multiple(self, config: Any) -> int:
        """Latent height and width must be multiples of this many cells: a token's, or more where the model folds tokens."""
        return self.patch(config)[1]

    @abstractmethod
    def default_latent_size(self, config: Any) -> tuple[int, int]:
        """Latent (height, width) the model was made for."""

    def video_frames(self, config: Any) -> int | None:
        """Pixel frames of a video when the request names none; None for pictures."""
        return self.default_frames

    def max_latent_frames(self, config: Any) -> int | None:
        """The most latent frames the model has positions for; None for any number."""
        return None

    @abstractmethod
    def timestep_scale(self, config: Any) -> float:
        """What the scheduler's timesteps are multiplied with before the step engine sees them."""

    def timestep_layers(self, model: nn.Module) -> tuple[str, ...]:
        """The model's ``Timesteps`` layers that are called with the step's timestep, one value a sample.

        The step computes their sinusoids itself (see `mc_export.program.timesteps`).
        """
        from diffusers.models.embeddings import Timesteps

        return tuple(name for name, layer in model.named_modules() if isinstance(layer, Timesteps))

    def scalar_layers(self, model: nn.Module) -> Mapping[str, tuple[str, ...]]:
        """The ``Timesteps`` layers that are called with a condition of one or several numbers a sample, by its name.

        Named as they are after :meth:`prepare_for_export`; the step computes their sinusoids as it does the timestep's.
        """
        return {}

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        """Further inputs of the step."""
        return ()

    def condition_axes(self, config: Any, max_tokens: int) -> tuple[Axis, ...]:
        """The dynamic dimensions of the conditions that the latents do not have; `max_tokens` is the longest side's."""
        return ()

    def condition_examples(self, config: Any, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Conditions that standard normal numbers, as in ``drawn``, would not stand for: flags, sizes, scales."""
        return {}

    def reference_sizes(self, config: Any) -> tuple[tuple[int, int], ...]:
        """Sizes (height, width) in pixels to which its pipeline brings an input picture; none: the output's."""
        return ()

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
        self, model: nn.Module, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **conditions: Tensor
    ) -> dict[str, Any]:
        """Keyword arguments of the model's forward.

        Args:
            model: as published, or after :meth:`prepare_for_export`.
            sample: scaled latents, a row a branch: `[N, C, (T,) H, W]`.
            timestep: `[N]`, scaled by :meth:`timestep_scale`.
            context: `[N, L, D]`; the prepared one after :meth:`prepare_for_export`.
            context_mask: `[N, L]`, how often a row counts: 0 or 1, or more where one padded row stands for many.
            conditions: those of :meth:`conditions`, a row a branch: `[N, *shape]`.
        """

    def clean_frames(self, sample: Tensor, **conditions: Tensor) -> Tensor | None:
        """Which of the target's frames are given clean, at timestep 0: ``[N, T]`` of 1 and 0; None where none ever is."""
        return None

    @abstractmethod
    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        """The part of the model's output that the sampler takes (learned variances are dropped), of the sample's shape."""

    def settled(self, sample: Tensor, **conditions: Tensor) -> Tensor:
        """The next latents `[B, C, (T,) H, W]` with what no step may change put back (a video's given first frame).

        ``conditions`` are those that all branches share.
        """
        return sample

    def adopt(self, model: nn.Module) -> None:  # noqa: B027  # most models need nothing
        """Changes a published model in place where its forward lacks what :meth:`arguments` gives it (a mask of the context).

        Its state dict and its outputs stay the same.
        """

    @abstractmethod
    def prepare_for_export(self, model: nn.Module) -> None:
        """Changes the model in place: what does not survive export, and what no step changes.

        Afterwards its context is what :meth:`context_preparation` gives; outputs stay the same.
        """

    def use_kernels(self, model: nn.Module) -> Mapping[str, int]:
        """Puts operators of `mc_kernels` into the blocks of a model after :meth:`prepare_for_export`, in place, for a GPU.

        Returns:
            How often each then occurs in a step; empty where no kernel is written for blocks of this kind.

        Raises:
            EngineError: some block was not matched.
        """
        return {}

    @abstractmethod
    def prepared_context_width(self, config: Any) -> int:
        """Width of the prepared context ``[B, L, width]``."""

    @abstractmethod
    def context_preparation(self, model: nn.Module) -> nn.Module:
        """All that the published model computes from the context alone: ``[B, L, context_width]`` to the prepared context.

        The module keeps what it needs of ``model``; take it before :meth:`prepare_for_export`.
        """

    @abstractmethod
    def encode_text(
        self, encoders: Sequence[nn.Module], input_ids: Sequence[Tensor], attention_masks: Sequence[Tensor]
    ) -> TextStates:
        """What the pipeline's text encoders, in the order of :attr:`encoders`, make of their ids and masks ``[B, L_i]``.

        It survives export with dynamic sizes. Masks are right padded. Rows are not selected yet.
        """

    def embed_picture(self, encoder: nn.Module, pixels: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
        """The context `[B, L, context_width]` that diffusers' pipeline makes of pictures with its image encoder.

        Args:
            encoder: transformers' vision model.
            pixels: `[B, 3, h, w]` in [0, 1], in their own size.
            mean, deviation: what the checkpoint normalises each channel with.
        """
        raise TypeError(f"{self.name} embeds no picture")

    def zeroes_empty_negative(self, pipeline: Mapping[str, Any]) -> bool:
        """Whether zeros stand for an empty negative prompt's states; ``pipeline`` holds the options of ``model_index.json``."""
        return False

    def context_rows(self, lengths: Sequence[str]) -> str:
        """Which of the encoders' lengths, by name, is the context's; the first one's unless they differ."""
        return lengths[0]

    @abstractmethod
    def text_tokens(self, tokenizers: Sequence[Any], prompts: Sequence[str], *, negative: bool = False) -> TextTokens:
        """Ids and masks of prompts, exactly as diffusers' pipeline makes them with transformers' tokenizers."""

    @abstractmethod
    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        """How the runtime makes the same ids from the tokenizers saved as ``files``; one an encoder."""

    def set_timesteps(self, scheduler: Any) -> SetTimesteps | None:
        """How diffusers' pipeline sets the scheduler's timesteps where it does more than name a step count."""
        return dynamic_shift_timesteps if scheduler.config.get("use_dynamic_shifting") else None
