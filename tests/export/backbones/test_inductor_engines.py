"""AOTInductor packages on the CPU, of every backbone: each engine equals its torch module at sizes it was not exported at.

A package takes half a minute to compile, so `make test` has one step with a block of a kind; every engine of every tiny
checkpoint is in the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_export.build.options import BuildOptions
from mc_export.build.parts import Limits, parts_of
from mc_export.build.verify import verify_engine
from mc_export.checkpoint import Checkpoint, load_checkpoint
from mc_export.lower import lower_program
from mc_export.program.base import Program
from mc_export.sampler import build_sampler_table
from mc_runtime.bundle.manifest import Engine, MeasuredError, Precision
from tests.factories import tiny_metacanvas_checkpoint, tiny_stock_sana
from tests.factories_unet import (
    tiny_metacanvas_animatediff,
    tiny_metacanvas_sdxl,
    tiny_stock_animatediff,
    tiny_stock_sdxl,
    tiny_stock_svd,
)
from tests.tiny_flux import tiny_flux, tiny_metacanvas_flux, tiny_stock_flux
from tests.tiny_steps import sizes_for, tiny_step
from tests.tiny_wan import tiny_metacanvas_wan, tiny_stock_wan, tiny_wan

CHECKPOINTS: dict[str, Callable[..., Path]] = {
    "sana": tiny_stock_sana,
    "sana-metacanvas": tiny_metacanvas_checkpoint,
    "flux-kontext": tiny_stock_flux,
    "flux-metacanvas": tiny_metacanvas_flux,
    "wan": tiny_stock_wan,
    "wan-metacanvas": tiny_metacanvas_wan,
    "sdxl": tiny_stock_sdxl,
    "sdxl-metacanvas": tiny_metacanvas_sdxl,
    "animatediff": tiny_stock_animatediff,
    "animatediff-metacanvas": tiny_metacanvas_animatediff,
    "svd": tiny_stock_svd,
}
# Of a checkpoint's engines, those that another checkpoint's do not stand for: an autoencoder is the same with a canvas.
ENGINES = [
    ("sana", ("text_encoder", "step", "vae_decoder", "vae_encoder")),
    ("sana-metacanvas", ("planner", "step")),
    ("flux-kontext", ("text_encoder", "step", "vae_encoder", "vae_decoder")),
    ("flux-metacanvas", ("vision", "planner", "step")),
    ("wan", ("text_encoder", "step", "vae_encoder", "vae_decoder", "vae_decoder_next", "vae_encoder_next")),
    ("wan-metacanvas", ("planner", "step")),
    ("sdxl", ("text_encoder", "step", "vae_decoder")),
    ("sdxl-metacanvas", ("planner", "step")),
    ("animatediff", ("text_encoder", "step", "vae_decoder")),
    ("animatediff-metacanvas", ("planner", "step")),
    ("svd", ("image_encoder", "step", "vae_encoder", "vae_decoder")),
]
SAME_WITH_A_CANVAS = ("vae_decoder", "vae_encoder", "vae_decoder_next", "vae_encoder_next")
# Relative L2 of any output. In bf16 that of a build (`mc_export.build.verify`).
TOLERANCE = {Precision.FP32: 2e-5, Precision.BF16: 5e-2}
Load = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder, loaded = tmp_path_factory.mktemp("checkpoints"), {}

    def load(name: str) -> Checkpoint:
        if name not in loaded:
            loaded[name] = load_checkpoint(CHECKPOINTS[name](folder / name, seed=3))
        return loaded[name]

    return load


def parts(checkpoint: Checkpoint, components: tuple[str, ...] = ()) -> dict[str, Any]:
    choice = BuildOptions().choice("step")
    options = BuildOptions(engines={name: choice for name in components if name == "vae_encoder"})
    sees = checkpoint.config is not None and len(checkpoint.config.tasks) > 1
    scheduler = checkpoint.load_scheduler()
    order = build_sampler_table(
        scheduler, max_steps=4, step_counts=[4], set_timesteps=checkpoint.backbone.set_timesteps(scheduler),
        token_counts=[16] if scheduler.config.get("use_dynamic_shifting") else [],
    ).order  # fmt: skip
    limits = Limits(
        max_batch=4, max_tokens=16, max_canvas=8, planner_length=64, text_lengths=(64,) * len(checkpoint.backbone.encoders),
        context_length=64, order=order, max_frames=8, vision_tokens=64 if sees else 0,
    )  # fmt: skip
    return {part.component: part for part in parts_of(checkpoint, limits, options)}


def check_package(
    make: Callable[[], Program],
    folder: Path,
    feeds: list[dict[str, torch.Tensor]] | None = None,
    precision: Precision = Precision.FP32,
) -> MeasuredError:
    """Compiles the program and compares, at a small request's sizes, at the example's and at odd larger ones."""
    program = make()
    files, options = lower_program("inductor", program, precision, folder)
    if precision is not Precision.FP32:
        program = make()  # the weights of what was compiled are not what they were
    spec = Engine(
        target="inductor", precision=precision, files=tuple(file.name for file in files),
        inputs=program.inputs, outputs=program.outputs, options=options,
    )  # fmt: skip
    extents = [program.example_extents, *program.check_extents()]
    feeds = feeds or [program.example(sizes, seed=seed) for seed, sizes in enumerate(extents)]
    error = verify_engine(program, spec, files, feeds, tolerance=TOLERANCE[precision])
    assert error.relative_l2 > 0, "an exact match of floats means that nothing was compared"
    return error


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model", "order"), [
    ("flux-kontext", tiny_flux(5, num_layers=1, num_single_layers=1), 1),
    ("wan-clips", tiny_wan(6, clips=True, num_layers=1), 2),
])  # fmt: skip
def test_a_step_of_one_block_equals_its_module(name: str, model: Any, order: int, tmp_path: Path) -> None:
    program = tiny_step(name, canvas=False, order=order, model=model)
    feeds = [program.example(sizes_for(program, large), seed=7) for large in (False, True)]
    for feed in feeds:  # the prediction is the result: it does not drown in the sample
        feed["coefficients"] = torch.eye(1 + 2 * order)[1 + order].expand(len(feed["sample"]), -1) + torch.eye(1 + 2 * order)[0]
    check_package(lambda: program, tmp_path, feeds)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize(("name", "component"), [(name, component) for name, listed in ENGINES for component in listed])
def test_every_engine_equals_its_module(
    load: Load, name: str, component: str, precision: Precision, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    error = check_package(parts(load(name), (component,))[component].make, tmp_path, precision=precision)
    record_property("relative_l2", f"{error.relative_l2:.3g}")


@pytest.mark.parametrize(("name", "listed"), ENGINES)
def test_every_engine_is_listed(load: Load, name: str, listed: tuple[str, ...]) -> None:
    found = set(parts(load(name), listed))
    assert found - set(SAME_WITH_A_CANVAS) == set(listed) - set(SAME_WITH_A_CANVAS)
    if not name.endswith("-metacanvas"):
        assert found == set(listed)
