"""What of an engine is in FP8: from the file that was given, from the cache, or measured now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_export.build.cache import build_entry, content_key, lookup
from mc_export.build.calibrate import CalibrationOptions, calibrate
from mc_export.build.options import EngineChoice
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import takes_programs
from mc_export.program.base import Program
from mc_export.quantize.fp8.apply import apply_fp8, check_within_loss
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.record import CalibrationRecord, Sensitivity
from mc_export.quantize.fp8.sensitivity import loss_of
from mc_runtime.bundle.decode import encode
from mc_runtime.bundle.manifest import Precision

_FILE = "calibration.json"


def activations_of(choice: EngineChoice) -> Activations:
    """What has a scale of its own in a target's engines of a precision."""
    if choice.precision is Precision.INT4:
        return Activations.BLOCKS
    return Activations.ROWS if takes_programs(choice.target) else Activations.TENSOR


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of a checkpoint's engines are in FP8 or INT4.

    Attributes:
        checkpoint: an opened one.
        file: what `mc-runtime calibrate` wrote; None to measure.
        force: measure anew, whatever the cache has.
    """

    checkpoint: Checkpoint
    file: Path | None
    force: bool

    def facts(self, component: str, choice: EngineChoice) -> dict[str, Any]:
        """What an engine depends on: the measured numbers of the file, or what they would be measured of.

        Raises:
            RequestError: the file is not readable, or has nothing on this engine.
            EngineError: by the file, no layers can be within the loss.
        """
        activations = activations_of(choice)
        found = self._given(component, activations)
        if found is not None:
            check_within_loss(found)
        return {"layers": encode(found) if found else [activations, loss_of(component, activations), self.checkpoint.sha256]}

    def apply(
        self, program: Program, choice: EngineChoice, tick: Callable[[float], None] = lambda share: None
    ) -> dict[str, Any]:
        """Puts such layers into a program and says what the manifest hears of it.

        Raises:
            EngineError: no layers can be within the loss.
            RequestError: the file is of another checkpoint or program.
        """
        component, activations = program.component, activations_of(choice)
        measured = self._given(component, activations) or self._measured(component, activations, tick)
        apply_fp8(program, measured)
        return measured.notes()

    def _given(self, component: str, activations: Activations) -> Sensitivity | None:
        if self.file is None:
            return None
        return CalibrationRecord.load(self.file).of(component, activations, self.checkpoint.sha256, str(self.file))

    def _measured(self, component: str, activations: Activations, tick: Callable[[float], None]) -> Sensitivity:
        options = CalibrationOptions(components=(component,), activations=(activations,))
        key = content_key(
            {"layers": [component, activations, loss_of(component, activations), self.checkpoint.sha256, options.seed]}
        )

        def make(folder: Path) -> dict[str, Any]:
            record = calibrate(self.checkpoint, options, lambda done, total, what: tick(done / total))
            record.save(folder / _FILE)
            return {}

        entry = (None if self.force else lookup(key)) or build_entry(key, make)
        return CalibrationRecord.load(entry.directory / _FILE).of(component, activations, self.checkpoint.sha256)
