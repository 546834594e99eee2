"""Every backbone, stock and MetaCanvas, in every task, target and precision: bundles of exported engines against the reference.

Generated from the specs: what a spec calls limited is refused with its reason, and built with the limited engine in another
precision. A target that compiles torch programs takes minutes an engine: of it, only the MetaCanvas step is built.

Final latents by `mc_export.support.BOUNDS`, relative L2; in float32 pictures within one level of 255 besides. Below float32 the
bounds are of sanity: the weights are random. What was measured goes into pytest's JUnit report, and by `benchmarks.matrix`
from there into docs/matrix.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from mc_export.backbones.base import Backbone
from mc_export.backbones.registry import BACKBONES
from mc_export.build import BuildOptions, EngineChoice, build_bundle
from mc_export.build.options import PRECISIONS
from mc_export.lower import takes_programs
from mc_export.reference import ReferencePipeline
from mc_export.support import BOUNDS
from mc_runtime import Runtime
from mc_runtime.backends.registry import available
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import RequestError
from tests.tiny_backbones import KINDS, PROMPTS, Case, backbone_named, cases, tiny_checkpoint, tiny_sizes

pytestmark = [pytest.mark.integration, pytest.mark.matrix]

LIMITS: dict[str, Any] = {"max_steps": 4, "max_batch": 2}


class Cell(NamedTuple):
    """One bundle of the matrix."""

    backbone: Backbone
    kind: str
    target: str
    precision: Precision

    @property
    def limited(self) -> dict[str, str]:
        """Engines that the spec excludes, with the reason."""
        limits = self.backbone.limits
        return {one.component: one.reason for one in limits if (one.target, one.precision) == (self.target, self.precision)}

    def options(self, **engines: EngineChoice) -> BuildOptions:
        """Of the build; of a target that takes programs only the step is its own."""
        if takes_programs(self.target):
            step = EngineChoice(self.target, self.precision)
            return BuildOptions(engines={"step": step, **engines}, **LIMITS)
        return BuildOptions(target=self.target, precision=self.precision, engines=engines, **LIMITS)


CELLS = [
    Cell(backbone, kind, target, precision)
    for backbone in BACKBONES
    for kind in KINDS
    for target, precisions in PRECISIONS.items()
    if kind == "metacanvas" or not takes_programs(target)
    for precision in precisions
]
Reference = Callable[[str, str], ReferencePipeline]
Expected = Callable[[str, str, Case], Any]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """`reference(backbone, kind)`, made once."""

    @cache
    def make(name: str, kind: str) -> ReferencePipeline:
        folder = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
        return ReferencePipeline.from_checkpoint(tiny_checkpoint(folder, backbone_named(name), kind))

    with tiny_sizes():
        yield make
    make.cache_clear()


@pytest.fixture(scope="module")
def expected(reference: Reference) -> Expected:
    """`expected(backbone, kind, case)`: what the reference makes, once."""

    @cache
    def generate(name: str, kind: str, case: Case) -> Any:
        pipeline = reference(name, kind)
        return pipeline.generate(PROMPTS, **case.arguments(pipeline.checkpoint))

    return generate


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.backbone.name}-{cell.kind}-{cell.target}-{cell.precision}")
def test_a_bundle_makes_what_the_reference_makes(
    cell: Cell, reference: Reference, expected: Expected, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    machine = available()[cell.target]
    if not machine["ready"]:
        pytest.skip(f"{cell.target}: {machine['reason']}")
    checkpoint = reference(cell.backbone.name, cell.kind).checkpoint
    for component, reason in cell.limited.items():
        with pytest.raises(RequestError) as refused:
            build_bundle(checkpoint.path, tmp_path / "refused", cell.options())
        assert reason in str(refused.value)
        assert f"--engine {component}=" in str(refused.value)
    instead = {component: EngineChoice("onnxruntime", Precision.FP32) for component in cell.limited}
    build_bundle(checkpoint.path, tmp_path / "bundle", cell.options(**instead))
    runtime = Runtime.load(tmp_path / "bundle", threads=1)
    wrong = []
    for case in cases(checkpoint):
        wanted = expected(cell.backbone.name, cell.kind, case)
        result = runtime.generate(PROMPTS, **case.arguments(checkpoint))
        error = np.linalg.norm(result.latents - wanted.latents) / np.linalg.norm(wanted.latents)
        ours, theirs = _pixels(result, 1), _pixels(wanted, 255)
        assert ours.shape == theirs.shape
        levels = np.abs(ours - theirs)
        what = "guided" if case.scale > 1 else "unguided"
        record_property(f"{case.task} {what}", f"{error:.3g} {levels.mean():.3g} {levels.max():.3g}")
        if not error <= BOUNDS[cell.precision] or (cell.precision is Precision.FP32 and levels.max() > 1):
            wrong.append(
                f"{case}: relative L2 {error:.2g}, pictures differ by {levels.max():.1f} levels, {levels.mean():.2g} on average"
            )
    assert not wrong, "\n".join(wrong)


def _pixels(result: Any, levels: int) -> np.ndarray:
    """Of pictures or clips, in levels of 255; the reference's clips are in [0, 1]."""
    if result.clips:
        return np.stack([getattr(clip, "frames", clip) for clip in result.clips]).astype(np.float64) * levels
    return np.stack([np.asarray(image) for image in result.images]).astype(np.float64)
