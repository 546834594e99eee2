"""The file that `mc-runtime calibrate` writes: what FP8 costs at every site of a checkpoint's programs, and what is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mc_export.quantize.fp8.layers import Activations
from mc_runtime.bundle.decode import DecodeError, decode, encode
from mc_runtime.errors import RequestError

FORMAT = "mc-runtime-calibration"
VERSION = 1
Reason = Literal["loss", "work"]
"""Why a site stays in bfloat16: what it costs, or that it does next to no work."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSite:
    """A site (`mc_export.quantize.fp8.sites.Site`) and what it costs.

    Attributes:
        layers: names in the program.
        work: share of the program's work in all sites.
        largest: of the input's magnitudes in calibration.
        error: relative L2 error of the program's results with this site alone in FP8.
        kept: why it stays in bfloat16; None where it does not.
    """

    layers: tuple[str, ...]
    work: float
    largest: float
    error: float
    kept: Reason | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What was measured of one component with one kind of scales.

    Attributes:
        component: the program.
        activations: what has a scale of its own.
        loss: the largest error wanted.
        error: of the program with all sites in FP8 that are not kept.
        error_of_all: with every site in FP8 that does any work to speak of.
        sites: in the order in which they run.
        calibrated_on: inputs that the ranges are from; the errors are from others.
    """

    component: str
    activations: Activations
    loss: float
    error: float
    error_of_all: float
    sites: tuple[MeasuredSite, ...]
    calibrated_on: int

    @property
    def kept(self) -> tuple[MeasuredSite, ...]:
        """The sites that stay in bfloat16."""
        return tuple(site for site in self.sites if site.kept)

    @property
    def kept_work(self) -> float:
        """Share of the work that stays in bfloat16."""
        return sum(site.work for site in self.kept)

    def notes(self) -> dict[str, Any]:
        """What the manifest hears of it."""
        return {
            "fp8": {
                "activations": self.activations.value,
                "loss": self.loss,
                "error": _short(self.error),
                "error_of_all": _short(self.error_of_all),
                "kept_work": round(self.kept_work, 4),
                "kept": [
                    {"layers": list(site.layers), "error": _short(site.error), "because": site.kept} for site in self.kept
                ],
                "calibrated_on": self.calibrated_on,
            }
        }


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord:
    """The whole file."""

    format: str = FORMAT
    version: int = VERSION
    checkpoint: str
    sha256: str
    seed: int
    measured: tuple[Sensitivity, ...]

    def of(self, component: str, activations: Activations, sha256: str, where: str = "this calibration") -> Sensitivity:
        """What was measured of a component of the checkpoint with this hash.

        Raises:
            RequestError: it is another checkpoint's, or that was not measured; the message has the command that does.
        """
        if sha256 != self.sha256:
            raise RequestError(f"{where}: is of another checkpoint ({self.checkpoint}); measure it with mc-runtime calibrate")
        for found in self.measured:
            if (found.component, found.activations) == (component, activations):
                return found
        raise RequestError(
            f"{where}: has nothing on {component} with a scale for each {_SCALED[activations]}; measure it with "
            f"mc-runtime calibrate --component {component} --scales {activations}"
        )

    def save(self, file: Path) -> None:
        """Writes it as JSON; errors and ranges in five digits."""
        short = [
            replace(
                one,
                error=_short(one.error), error_of_all=_short(one.error_of_all),
                sites=tuple(
                    replace(site, work=_short(site.work), largest=_short(site.largest), error=_short(site.error))
                    for site in one.sites
                ),
            )
            for one in self.measured
        ]  # fmt: skip
        document = encode(replace(self, measured=tuple(short)))
        file.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> CalibrationRecord:
        """Reads it.

        Raises:
            RequestError: it is not there, or not such a file.
        """
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            found: CalibrationRecord = decode(cls, document)
        except (OSError, ValueError, DecodeError) as error:
            raise RequestError(f"{file}: not a calibration ({error}); write one with mc-runtime calibrate") from error
        if (found.format, found.version) != (FORMAT, VERSION):
            raise RequestError(
                f"{file}: {found.format} {found.version}, not {FORMAT} {VERSION}; run mc-runtime calibrate again"
            )
        return found


_SCALED = {Activations.ROWS: "row", Activations.TENSOR: "tensor"}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
