"""The file that `mc-runtime calibrate` writes: what FP8 or INT4 costs at every site of its programs, and what is kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mc_export.quantize.fp8.layers import Activations
from mc_runtime.bundle.decode import decode, encode
from mc_runtime.errors import RequestError, named, printable
from mc_runtime.media.files import read_bytes, write_whole

FORMAT = "mc-runtime-calibration"
VERSION = 1
_LARGEST_FILE = 2**26
# Magnitudes whose scale is a number of float32; shares are rounded.
_LARGEST = 1e30
_ALL = 1.001
Reason = Literal["loss", "work"]
"""Why a site stays in bfloat16: what it costs, or that it does next to no work."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSite:
    """A site (`mc_export.quantize.fp8.sites.Site`) and what it costs.

    Attributes:
        layers: names in the program.
        work: share of the program's work in all sites.
        largest: of the input's magnitudes in calibration.
        error: relative L2 error of the program's results with this site alone in FP8 or INT4.
        kept: why it stays in bfloat16; None where it does not.
    """

    layers: tuple[str, ...]
    work: float
    largest: float
    error: float
    kept: Reason | None = None

    def __post_init__(self) -> None:
        if not self.layers or not (0 <= self.work <= _ALL and 0 <= self.largest <= _LARGEST and self.error >= 0):
            raise ValueError("sites: expected layers, a share of the work, a magnitude and an error")


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What was measured of one component with one kind of scales.

    Attributes:
        component: the program.
        activations: what has a scale of its own.
        loss: the largest error wanted.
        error: of the program with all sites changed that are not kept.
        error_of_all: with every site changed that does any work to speak of.
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

    def __post_init__(self) -> None:
        if not (0 < self.loss < 1 and self.error >= 0 and self.error_of_all >= 0 and self.calibrated_on >= 1):
            raise ValueError(f"{self.component}: expected a loss between 0 and 1, errors and how many inputs it is from")
        layers = [layer for site in self.sites for layer in site.layers]
        if len(set(layers)) < len(layers):
            raise ValueError(f"{self.component}: a layer is in two sites")

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
            self.activations.numbers.lower(): {
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
            raise RequestError(
                f"{where}: is of another checkpoint ({named(self.checkpoint)}); measure it with mc-runtime calibrate"
            )
        for found in self.measured:
            if (found.component, found.activations) == (component, activations):
                return found
        raise RequestError(
            f"{where}: has nothing on {component} with a scale for each {_SCALED[activations]}; measure it with "
            f"mc-runtime calibrate --component {component} --scales {activations}"
        )

    def save(self, file: Path) -> None:
        """Writes it as JSON, whole or not at all; errors and ranges in five digits. Raises OutputError."""
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
        write_whole(file, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, file: Path) -> CalibrationRecord:
        """Reads it.

        Raises:
            RequestError: it is not there, or not such a file.
        """
        try:
            document = json.loads(read_bytes(file, _LARGEST_FILE))
            found: CalibrationRecord = decode(cls, document)
        except (ValueError, RecursionError) as error:  # those of `read_bytes` and `decode`, too
            raise RequestError(
                f"{file}: not a calibration ({printable(str(error))}); write one with mc-runtime calibrate"
            ) from error
        if (found.format, found.version) != (FORMAT, VERSION):
            raise RequestError(
                f"{file}: {named(found.format)} {found.version}, not {FORMAT} {VERSION}; run mc-runtime calibrate again"
            )
        return found


_SCALED = {Activations.ROWS: "row", Activations.TENSOR: "tensor", Activations.BLOCKS: "block"}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
