"""What of an engine is in FP8: from the file that was given, from the cache, or measured now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_export.build.cache import build_entry, content_key, lookup
from mc_export.build.calibrate import CalibrationOptions, calibrate
from mc_export.checkpoint.checkpoint import Checkpoint
from mc_export.lower import takes_programs
from mc_export.program.base import Program
from mc_export.quantize.fp8.apply import apply_fp8
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.record import CalibrationRecord, Sensitivity
from mc_export.quantize.fp8.sensitivity import LOSS
from mc_runtime.bundle.decode import encode

_FILE = "calibration.json"


def activations_of(target: str) -> Activations:
    """What has a scale of its own in a target's FP8 engines."""
    return Activations.ROWS if takes_programs(target) else Activations.TENSOR


@dataclass(frozen=True)
class Fp8Choice:
    """Which layers of a checkpoint's engines are in FP8.

    Attributes:
        checkpoint: an opened one.
        file: what `mc-runtime calibrate` wrote; None to measure.
        force: measure anew, whatever the cache has.
    """

    checkpoint: Checkpoint
    file: Path | None
    force: bool

    def facts(self, component: str, target: str) -> dict[str, Any]:
        """What an engine depends on: the measured numbers of the file, or what they would be measured of.

        Raises:
            RequestError: the file is not readable, or has nothing on this engine.
        """
        found = self._given(component, activations_of(target))
        return {"fp8": encode(found) if found else [activations_of(target), LOSS[component], self.checkpoint.sha256]}

    def apply(self, program: Program, target: str, tick: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
        """Puts FP8 layers into a program and says what the manifest hears of it.

        Raises:
            EngineError: no layers can be in FP8 within the loss.
            RequestError: the file is of another checkpoint or program.
        """
        component, activations = program.component, activations_of(target)
        measured = self._given(component, activations) or self._measured(component, activations, tick)
        apply_fp8(program, measured)
        return measured.notes()

    def _given(self, component: str, activations: Activations) -> Sensitivity | None:
        if self.file is None:
            return None
        return CalibrationRecord.load(self.file).of(component, activations, self.checkpoint.sha256, str(self.file))

    def _measured(self, component: str, activations: Activations, tick: Callable[[float], None]) -> Sensitivity:
        options = CalibrationOptions(components=(component,), activations=(activations,))
        key = content_key({"fp8": [component, activations, LOSS[component], self.checkpoint.sha256, options.seed]})

        def make(folder: Path) -> dict[str, Any]:
            record = calibrate(self.checkpoint, options, lambda done, total, what: tick(done / total))
            record.save(folder / _FILE)
            return {}

        entry = (None if self.force else lookup(key)) or build_entry(key, make)
        return CalibrationRecord.load(entry.directory / _FILE).of(component, activations, self.checkpoint.sha256)
