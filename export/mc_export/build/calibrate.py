"""`mc-runtime calibrate`: what FP8 or INT4 costs at every site of a checkpoint's programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mc_export.build.options import BY_LAYER_COMPONENTS, BuildOptions
from mc_export.build.parts import Limits, parts_of
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import Calibration
from mc_export.program.base import Program
from mc_export.quantize.calibration import calibration_inputs
from mc_export.quantize.fp8.layers import FP8_ACTIVATIONS, Activations
from mc_export.quantize.fp8.record import CalibrationRecord, Sensitivity
from mc_export.quantize.fp8.sensitivity import loss_of, measure
from mc_export.vision import planner_vision
from mc_runtime.errors import RequestError

Report = Callable[[float, float, str], None]


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What to measure.

    Attributes:
        components: engines; none for all that it is for.
        activations: kinds of scales.
        loss: the largest relative L2 error wanted of an engine; None for each one's own (`loss_of`).
        seed: of the noise that is denoised for it.

    Raises:
        RequestError: an engine that it is not for, or a loss that is none.
    """

    components: Sequence[str] = ()
    activations: Sequence[Activations] = FP8_ACTIVATIONS
    loss: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for component in self.components:
            if component not in BY_LAYER_COMPONENTS:
                raise RequestError(f"component {component!r}: FP8 and INT4 are for {' and '.join(BY_LAYER_COMPONENTS)}")
        if self.loss is not None and not 0 < self.loss < 1:
            raise RequestError(f"loss must be between 0 and 1, got {self.loss:g}")


def calibrate(
    checkpoint: Checkpoint, options: CalibrationOptions, report: Report = lambda done, total, what: None
) -> CalibrationRecord:
    """Measures a checkpoint.

    Args:
        checkpoint: an opened one.
        options: what to measure.
        report: told how much is done, of how much, and of what; what it raises stops it.

    Raises:
        RequestError: the checkpoint has none of the engines.
        EngineError: one of them has nothing that it is for.
    """
    there = [name for name in BY_LAYER_COMPONENTS if name != "planner" or checkpoint.config is not None]
    asked = [name for name in there if not options.components or name in options.components]
    if not asked:
        raise RequestError(f"this checkpoint has no {' or '.join(options.components)}; it has {', '.join(there)}")
    measured: list[Sensitivity] = []
    total = float(len(asked) * len(options.activations))
    for component in asked:
        report(len(measured), total, f"{component}: denoising")
        inputs = calibration_inputs(checkpoint, component, options.seed)
        program = program_of(checkpoint, component, inputs)
        for activations in options.activations:
            before = float(len(measured))

            def tick(done: int, of: int, what: str, before: float = before, name: str = component) -> None:
                report(before + done / of, total, what if what == name else f"{name}: {what}")

            loss = loss_of(component, activations) if options.loss is None else options.loss
            measured.append(measure(program, inputs, activations, loss, tick))
    name = checkpoint.path.resolve().name
    return CalibrationRecord(checkpoint=name, sha256=checkpoint.sha256, seed=options.seed, measured=tuple(measured))


def program_of(checkpoint: Checkpoint, component: str, inputs: Calibration) -> Program:
    """The program of an engine for inputs of it; how far its dimensions would reach is of no matter here."""
    order = (inputs[0]["coefficients"].shape[1] - 1) // 2 if component == "step" else 1
    limits = Limits(
        max_batch=2, max_tokens=64, max_canvas=64, planner_length=4096, text_lengths=(), context_length=4096, order=order,
        max_frames=64, vision_tokens=4096 if planner_vision(checkpoint) is not None else 0,
    )  # fmt: skip
    parts: Mapping[str, Callable[[], Program]] = {
        part.component: part.make for part in parts_of(checkpoint, limits, BuildOptions())
    }
    return parts[component]()
