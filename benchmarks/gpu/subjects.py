"""The models that are measured, in their published configurations, and tiny ones of the same kinds for the dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.flux import Flux, FluxKontext
from mc_export.backbones.sana import Sana
from mc_export.backbones.wan import Wan
from mc_export.backbones.wan_export import row_weights


@dataclass(frozen=True)
class PlannerSize:
    """A Qwen2.5-VL decoder."""

    width: int
    layers: int
    heads: int
    key_value_heads: int
    middle: int
    vocabulary: int


PLANNER_3B = PlannerSize(2048, 36, 16, 2, 11008, 151936)
PLANNER_7B = PlannerSize(3584, 28, 28, 4, 18944, 152064)


@dataclass(frozen=True)
class Subject:
    """A model and the request it is measured with.

    Attributes:
        name: of its section.
        adapter, published: as our programs and as the reference call it; they differ where ours passes a mask that the
            published pipeline does not have.
        model: the backbone's class and configuration.
        one_block: the same with a block of each kind, where only the connector is measured.
        planner: None where only steps are measured: context and canvas are then random numbers.
        autoencoder: likewise.
        scheduler: as the published pipeline has it.
        latent: channels, (frames,) height and width of the latents.
        grid: of the canvas.
        rows: tokens of the instruction.
        steps: of a request.
        timed_steps: of a timed loop; fewer than `steps` where the rest is extrapolated.
        checked_steps: of the loop whose latents are compared.
        truth: whether the comparison is with float32 weights and arithmetic; otherwise with bfloat16 eager.
        told: the backbone's further inputs; "random" for random numbers, zeros where none is named.
        extents: of those inputs' own dimensions.
        package: whether a package of the step is compiled in every run; it takes minutes for the larger models.
    """

    name: str
    adapter: Backbone
    model: Callable[[], nn.Module]
    one_block: Callable[[], nn.Module]
    scheduler: Callable[[], Any]
    latent: tuple[int, ...]
    grid: tuple[int, int, int]
    rows: int
    steps: int
    guidance: float
    planner: PlannerSize | None = None
    autoencoder: Callable[[], nn.Module] | None = None
    published: Backbone | None = None
    timed_steps: int | None = None
    checked_steps: int = 2
    truth: bool = True
    told: Mapping[str, float | str] = field(default_factory=dict)
    extents: Mapping[str, int] = field(default_factory=dict)
    package: bool = False

    @property
    def branches(self) -> int:
        """Of guidance."""
        return 2 if self.adapter.weighs_branches(self.guidance) else 1

    @property
    def loop(self) -> int:
        """Steps of a timed loop."""
        return self.timed_steps or self.steps


class _Unmasked:
    """The published FLUX pipelines pass no mask of the context, which leaves attention its fastest kernels."""

    def arguments(self, *positional: Any, **named: Tensor) -> dict[str, Any]:
        return super().arguments(*positional, **named) | {"joint_attention_kwargs": None}  # type: ignore[misc]


class UnmaskedWan(Wan):
    """Wan as diffusers calls it: no mask of the context either."""

    def arguments(self, model: Any, *positional: Any, **named: Tensor) -> dict[str, Any]:
        arguments = super().arguments(model, *positional, **named)
        _, cross = row_weights(model)
        cross.bias = None
        return arguments


class UnmaskedFlux(_Unmasked, Flux):
    """FLUX.1-dev as diffusers calls it."""


class UnmaskedKontext(_Unmasked, FluxKontext):
    """FLUX.1-Kontext as diffusers calls it."""


def _flow(shift: float, kind: type) -> Callable[[], Any]:
    return lambda: kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000)


def _flux_scheduler() -> Any:
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )


def _sana(heads: int, layers: int, cross: int, context: int, channels: int) -> Callable[[], nn.Module]:
    return lambda: SanaTransformer2DModel(
        in_channels=channels, out_channels=channels, num_attention_heads=heads, attention_head_dim=32, num_layers=layers,
        num_cross_attention_heads=cross, cross_attention_head_dim=32 * heads // cross, cross_attention_dim=32 * heads,
        caption_channels=context, sample_size=32, patch_size=1, mlp_ratio=2.5,
    )  # fmt: skip


def _flux(heads: int, head: int, layers: tuple[int, int], context: int, pooled: int, axes: tuple[int, ...], channels: int = 16):
    return lambda: FluxTransformer2DModel(
        in_channels=4 * channels, num_layers=layers[0], num_single_layers=layers[1], num_attention_heads=heads,
        attention_head_dim=head, joint_attention_dim=context, pooled_projection_dim=pooled, guidance_embeds=True,
        axes_dims_rope=axes,
    )  # fmt: skip


def _wan(heads: int, head: int, layers: int, channels: int, context: int, middle: int) -> Callable[[], nn.Module]:
    return lambda: WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=head, in_channels=channels, out_channels=channels,
        text_dim=context, freq_dim=256, ffn_dim=middle, num_layers=layers, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    )  # fmt: skip


def _deep_compression(channels: tuple[int, ...], encoder: tuple[int, ...], decoder: tuple[int, ...], latent: int, first: int):
    def make() -> nn.Module:
        stages = range(len(channels))
        types = tuple("ResBlock" if stage < first else "EfficientViTBlock" for stage in stages)
        scales: tuple[Any, ...] = tuple(() if stage < first else (5,) for stage in stages)
        return AutoencoderDC(
            in_channels=3, latent_channels=latent, attention_head_dim=32 if latent > 4 else 8, encoder_block_types=types,
            decoder_block_types=types, encoder_block_out_channels=channels, decoder_block_out_channels=channels,
            encoder_layers_per_block=encoder, decoder_layers_per_block=decoder, encoder_qkv_multiscales=scales,
            decoder_qkv_multiscales=scales, upsample_block_type="interpolate", downsample_block_type="conv",
            decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
        )  # fmt: skip

    return make


def _kl(channels: tuple[int, ...], latent: int, layers: int, groups: int) -> Callable[[], nn.Module]:
    return lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels, latent_channels=latent, layers_per_block=layers, norm_num_groups=groups,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def subject(name: str, dry: bool = False) -> Subject:
    """The subject of a section."""
    return (_tiny if dry else _real)()[name]


def names() -> tuple[str, ...]:
    """Of all subjects."""
    return ("sana", "flux-kontext", "flux", "wan")


def _real() -> dict[str, Subject]:
    flux = [_flux(24, 128, layers, 4096, 768, (16, 56, 56)) for layers in ((19, 38), (1, 1))]
    picture: dict[str, Any] = {
        "model": flux[0], "one_block": flux[1], "scheduler": _flux_scheduler, "latent": (16, 128, 128), "grid": (1, 32, 32),
        "rows": 512, "steps": 28,
        "planner": PLANNER_7B, "autoencoder": _kl((128, 256, 512, 512), 16, 2, 32),
    }  # fmt: skip
    found = (
        Subject(
            "sana", Sana(), *(_sana(70, layers, 20, 2304, 32) for layers in (20, 1)), _flow(3.0, DPMSolverMultistepScheduler),
            latent=(32, 32, 32), grid=(1, 16, 16), rows=320, steps=20, guidance=4.5, planner=PLANNER_3B,
            checked_steps=20, package=True,
            autoencoder=_deep_compression((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), (3,) * 6, 32, first=3),
        ),
        Subject(
            "flux-kontext", FluxKontext(), published=UnmaskedKontext(), guidance=2.5, extents={"RH": 128, "RW": 128},
            told={"guidance_scale": 2.5, "reference": "random", "has_reference": 1.0}, **picture,
        ),
        Subject("flux", Flux(), published=UnmaskedFlux(), guidance=3.5, told={"guidance_scale": 3.5}, **picture),
        Subject(
            "wan", Wan(), *(_wan(24, 128, layers, 48, 4096, 14336) for layers in (30, 1)), _flow(5.0, UniPCMultistepScheduler),
            latent=(48, 31, 44, 80), grid=(3, 11, 20), rows=512, steps=50, guidance=5.0, timed_steps=2, truth=False,
            published=UnmaskedWan(),
        ),
    )  # fmt: skip
    return {each.name: each for each in found}


def _tiny() -> dict[str, Subject]:
    planner = PlannerSize(32, 2, 2, 1, 48, 100)
    flux = [_flux(2, 32, layers, 32, 16, (8, 12, 12), channels=4) for layers in ((2, 2), (1, 1))]
    picture: dict[str, Any] = {
        "model": flux[0], "one_block": flux[1], "scheduler": _flux_scheduler, "latent": (4, 6, 4), "grid": (1, 2, 2),
        "rows": 32, "steps": 2,
        "planner": planner, "autoencoder": _kl((8, 8), 4, 1, 4),
    }  # fmt: skip
    found = (
        Subject(
            "sana", Sana(), *(_sana(2, layers, 2, 48, 4) for layers in (2, 1)), _flow(3.0, DPMSolverMultistepScheduler),
            latent=(4, 4, 6), grid=(1, 2, 2), rows=32, steps=3, guidance=4.5, planner=planner, checked_steps=3,
            autoencoder=_deep_compression((8, 16), (1, 1), (1, 1), 4, first=1),
        ),
        Subject(
            "flux-kontext", FluxKontext(), published=UnmaskedKontext(), guidance=2.5, extents={"RH": 2, "RW": 4},
            told={"guidance_scale": 2.5, "reference": "random", "has_reference": 1.0}, **picture,
        ),
        Subject("flux", Flux(), published=UnmaskedFlux(), guidance=3.5, told={"guidance_scale": 3.5}, **picture),
        Subject(
            "wan", Wan(), *(_wan(2, 32, layers, 4, 32, 48) for layers in (2, 1)), _flow(5.0, UniPCMultistepScheduler),
            latent=(4, 2, 4, 4), grid=(2, 1, 2), rows=32, steps=50, guidance=5.0, timed_steps=2, truth=False,
            published=UnmaskedWan(),
        ),
    )  # fmt: skip
    return {each.name: each for each in found}
