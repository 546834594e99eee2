"""The step of a video backbone with conditions of its own, a scale a frame and a given first frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn

from mc_export.backbones.base import Backbone
from mc_export.backbones.spec import Condition, TextStates, TextTokens
from mc_export.model.injection import CanvasBackbone
from mc_export.program.base import Axis
from mc_export.program.export import export_program
from mc_export.program.step import StepProgram
from mc_runtime.bundle.manifest import Prompting


class ToyModel(nn.Module, ConfigMixin):
    """A convolution over frames, shifted by everything it is told."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, extra: Tensor, return_dict: bool) -> tuple[Tensor]:
        shift = t / 1000 + context.mean((1, 2)) + pooled.mean(1)
        return (self.embed(x) + shift[:, None, None, None, None] + extra.mean((2, 3))[:, :, None, None, None],)


def with_first(frame: Tensor, video: Tensor) -> Tensor:
    """Without a cut: frames behind the first one would have a size that the exporter takes for at least 1."""
    return torch.where((torch.arange(video.shape[2]) == 0)[:, None, None], frame, video)


class Toy(Backbone):
    """Takes a pooled vector a branch, reference latents of their own size, and a first frame that no step may change."""

    name, model_classes, component, patch_embedding = "toy", ("ToyModel",), "transformer", "embed"
    tasks, default_guidance, default_steps = ("image-to-video",), 3.0, 4
    latent_axes, guidance_ramp_from, default_frames = ("T", "H", "W"), 1.0, 5

    def width(self, config: Any) -> int:
        return 3

    def context_width(self, config: Any) -> int:
        return 6

    def pooled_width(self, config: Any) -> int:
        return 4

    def latent_channels(self, config: Any) -> int:
        return 3

    def patch(self, config: Any) -> tuple[int, int, int]:
        return (1, 1, 1)

    def default_latent_size(self, config: Any) -> tuple[int, int]:
        return (8, 8)

    def timestep_scale(self, config: Any) -> float:
        return 1.0

    def conditions(self, config: Any) -> tuple[Condition, ...]:
        return (
            Condition("pooled", (4,), "pooled", per_branch=True),
            Condition("reference", (3, "RH", "RW"), "reference_latents"),
            Condition("first_frame", (3, 1, "H", "W"), "first_frame"),
        )

    def condition_axes(self, config: Any, max_tokens: int) -> tuple[Axis, ...]:
        return (Axis("RH", 2, max_tokens, 6), Axis("RW", 2, max_tokens, 7))

    def target_grid(self, tokens: Tensor, sample: Tensor, config: Any) -> Tensor:
        return tokens.movedim(1, -1)

    def add_to_target(self, tokens: Tensor, residual: Tensor) -> Tensor:
        return tokens + residual.movedim(-1, 1)

    def arguments(self, model: Any, sample: Tensor, timestep: Tensor, context: Tensor, context_mask: Tensor, **told: Tensor):
        frames = with_first(told["first_frame"], sample)
        return {"x": frames, "t": timestep, "context": context, "pooled": told["pooled"], "extra": told["reference"]}

    def prediction(self, output: Tensor, sample: Tensor) -> Tensor:
        return output

    def settled(self, sample: Tensor, **conditions: Tensor) -> Tensor:
        return with_first(conditions["first_frame"], sample)

    def prepare_for_export(self, model: nn.Module) -> None: ...

    def prepared_context_width(self, config: Any) -> int:
        return 6

    def context_preparation(self, model: nn.Module) -> nn.Module:
        return nn.Identity()

    def encode_text(self, encoders: Any, input_ids: Any, attention_masks: Any) -> TextStates:
        raise AssertionError("no text in this test")

    def text_tokens(self, tokenizers: Any, prompts: Any, *, negative: bool = False) -> TextTokens:
        raise AssertionError("no text in this test")

    def prompting(self, tokenizers: Sequence[Any], files: Sequence[str]) -> tuple[Prompting, ...]:
        raise AssertionError("no text in this test")


def test_conditions_ramp_and_first_frame_equal_a_plain_step() -> None:
    torch.manual_seed(5)
    model = ToyModel()
    program = StepProgram(CanvasBackbone(Toy(), model, None), 6, order=2).eval()
    feed = program.example({"B": 3, "G": 2, "T": 4, "H": 5, "W": 3, "L": 6, "RH": 2, "RW": 5}, seed=9)
    feed["guidance"] = torch.randn(3, 2, 4)
    results = program.run(feed)
    with torch.no_grad():
        for row in range(3):
            one = {name: tensor[row] for name, tensor in feed.items()}
            scale, own, before, now, earlier = one["coefficients"]
            x = one["sample"] * scale
            predictions = []
            for branch in range(2):
                frames = torch.cat([one["first_frame"], x[:, 1:]], dim=1)
                shift = one["timestep"] / 1000 + one["context"][branch].mean() + one["pooled"][branch].mean()
                mean = one["reference"].mean((1, 2))[:, None, None, None]
                predictions.append(model.embed(frames[None])[0] + shift + mean)
            weights = one["guidance"][:, None, :, None, None]
            prediction = (torch.stack(predictions) * weights).sum(0)
            expected = own * one["sample"] + before * one["history"][0] + now * prediction + earlier * one["history"][1]
            expected[:, 0] = one["first_frame"][:, 0]
            torch.testing.assert_close(results["next_sample"][row], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(results["next_history"][row, 0], one["sample"])
            torch.testing.assert_close(results["next_history"][row, 1], prediction, rtol=1e-5, atol=1e-5)


def test_conditions_export_with_every_size_dynamic() -> None:
    torch.manual_seed(6)
    exported = export_program(StepProgram(CanvasBackbone(Toy(), ToyModel(), None), 6, order=1))
    names = [spec.name for spec in StepProgram(CanvasBackbone(Toy(), ToyModel(), None), 6, order=1).inputs]
    assert [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind.name == "USER_INPUT"] == names
