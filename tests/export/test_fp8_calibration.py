"""What FP8 costs a program, layer by layer; what is kept for it, and the file that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_export.build.calibrate import CalibrationOptions, calibrate, program_of
from mc_export.build.layer_choice import LayerChoice
from mc_export.build.options import BuildOptions, EngineChoice
from mc_export.checkpoint import Checkpoint
from mc_export.quantize.calibration import calibration_inputs
from mc_export.quantize.fp8.apply import apply_fp8
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.record import CalibrationRecord, Sensitivity
from mc_export.quantize.fp8.sensitivity import choose, sites_of
from mc_export.quantize.fp8.sites import Site
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError, OutputError, RequestError


@pytest.fixture(scope="module")
def record(checkpoints: dict[str, Checkpoint]) -> CalibrationRecord:
    return calibrate(checkpoints["metacanvas"], CalibrationOptions(loss=0.06))


def test_calibration_measures_every_site(record: CalibrationRecord, checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["metacanvas"]
    assert [(one.component, one.activations.value) for one in record.measured] == [
        ("planner", "rows"), ("planner", "tensor"), ("step", "rows"), ("step", "tensor")
    ]  # fmt: skip
    assert record.sha256 == checkpoint.sha256
    for one in record.measured:
        assert sum(site.work for site in one.sites) == pytest.approx(1)
        assert all(0 < site.error < 1 for site in one.sites)
        assert 0 < one.error <= one.error_of_all
        assert one.error <= one.loss or not sites_of(one)
    step = record.of("step", Activations.ROWS, checkpoint.sha256)
    root = sum(site.error**2 for site in step.sites if site.kept is None) ** 0.5
    assert 0.3 * root < step.error < 3 * root, "errors of layers add up like noise"


def test_calibration_is_the_same_every_time(record: CalibrationRecord, checkpoints: dict[str, Checkpoint]) -> None:
    again = calibrate(
        checkpoints["metacanvas"], CalibrationOptions(components=("planner",), activations=(Activations.ROWS,), loss=0.06)
    )
    assert again.measured == record.measured[:1]


def test_the_error_is_that_of_the_program_with_those_sites(
    record: CalibrationRecord, checkpoints: dict[str, Checkpoint]
) -> None:
    checkpoint = checkpoints["metacanvas"]
    measured = record.of("planner", Activations.TENSOR, checkpoint.sha256)
    inputs = calibration_inputs(checkpoint, "planner")
    program, reference = (program_of(checkpoint, "planner", inputs).eval() for _ in range(2))
    apply_fp8(program, measured)
    feed = {name: torch.from_numpy(array) for name, array in inputs[2].items()}
    for name, expected in reference.run(feed).items():
        error = (program.run(feed)[name] - expected).norm() / expected.norm()
        assert 0 < error < 2 * measured.error, name


def sites_with(*numbers: tuple[float, float]) -> tuple[list[Site], dict[str, float]]:
    sites = [Site((f"layer{index}",), work, 1.0) for index, (work, _) in enumerate(numbers)]
    return sites, {site.name: error for site, (_, error) in zip(sites, numbers, strict=True)}


def adding_up(errors: dict[str, float], factor: float = 1.0) -> Callable[[Sequence[Site]], float]:
    return lambda sites: factor * sum(errors[site.name] ** 2 for site in sites) ** 0.5


def test_the_dearest_layers_for_their_work_are_kept() -> None:
    sites, errors = sites_with((1, 0.04), (10, 0.05), (1, 0.001), (10, 0.03))
    probe = adding_up(errors)
    assert choose(sites, errors, probe, 0.1, probe(sites)) == (frozenset(), probe(sites))
    kept, error = choose(sites, errors, probe, 0.06, probe(sites))
    assert kept == {"layer0"}, "a tenth of the work of layer1, and nearly its error"
    assert error == pytest.approx(probe(sites[1:]))
    kept, error = choose(sites, errors, probe, 0.01, probe(sites))
    assert (kept, error) == ({"layer0", "layer1", "layer3"}, 0.001)
    kept, error = choose(sites, errors, probe, 1e-4, probe(sites))
    assert (len(kept), error) == (4, 0.0)


def test_more_are_kept_where_errors_do_not_add_up_as_promised() -> None:
    sites, errors = sites_with(*((1.0, 0.01 * (index + 1)) for index in range(8)))
    together = adding_up(errors)

    def worse(found: Sequence[Site]) -> float:
        return together(found) * (1 + len(found) / 8)

    kept, error = choose(sites, errors, worse, 0.03, worse(sites))
    assert error <= 0.03
    assert kept == {f"layer{index}" for index in range(8 - (8 - len(kept)), 8)} or kept == {
        f"layer{index}" for index in range(8 - len(kept), 8)
    }


def test_the_file_holds_what_was_measured(record: CalibrationRecord, tmp_path: Path) -> None:
    file = tmp_path / "fp8.json"
    record.save(file)
    loaded = CalibrationRecord.load(file)
    assert [site.kept for one in loaded.measured for site in one.sites] == [
        site.kept for one in record.measured for site in one.sites
    ]
    assert loaded.measured[2].sites[1].error == pytest.approx(record.measured[2].sites[1].error, rel=1e-4)
    notes = json.loads(json.dumps(loaded.measured[2].notes()))["fp8"]
    assert notes["activations"] == "rows"
    assert {kept["because"] for kept in notes["kept"]} <= {"loss", "work"}
    assert notes["kept"], "the timestep's layers do next to no work"


def test_a_file_that_does_not_fit_says_what_to_run(
    record: CalibrationRecord, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    file, checkpoint = tmp_path / "fp8.json", checkpoints["metacanvas"]
    with pytest.raises(RequestError, match=r"not a calibration.*write one with mc-runtime calibrate"):
        CalibrationRecord.load(file)
    file.write_text('{"format": "mc-runtime-calibration"}')
    with pytest.raises(RequestError, match="not a calibration"):
        CalibrationRecord.load(file)
    replace(record, version=2).save(file)
    with pytest.raises(RequestError, match="run mc-runtime calibrate again"):
        CalibrationRecord.load(file)
    replace(record, measured=record.measured[:1]).save(file)
    choice = LayerChoice(checkpoint, file, force=False)
    assert "layers" in choice.facts("planner", EngineChoice("inductor-cuda", Precision.FP8))
    with pytest.raises(RequestError, match=r"nothing on planner with a scale for each tensor.*--scales tensor"):
        choice.facts("planner", EngineChoice("tensorrt-rtx", Precision.FP8))
    with pytest.raises(RequestError, match="of another checkpoint"):
        LayerChoice(checkpoints["stock"], file, force=False).facts("planner", EngineChoice("inductor-cuda", Precision.FP8))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("measured", 0, "loss"), 5.0),
        (("measured", 0, "error"), -0.1),
        (("measured", 0, "calibrated_on"), 0),
        (("measured", 0, "sites", 0, "largest"), 1e300),
        (("measured", 0, "sites", 0, "largest"), -1.0),
        (("measured", 0, "sites", 0, "work"), float("nan")),
        (("measured", 0, "sites", 0, "layers"), []),
        (("measured", 0, "sites", 0, "layers"), "same"),
        (("measured", 0, "sites"), None),
        (("k" * 10_000,), 1),
    ],
)
def test_a_file_that_was_edited_into_nonsense_is_refused(
    record: CalibrationRecord, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    file = tmp_path / "fp8.json"
    record.save(file)
    document: Any = json.loads(file.read_text())
    *path, last = place
    inner = document
    for key in path:
        inner = inner[key]
    inner[last] = document["measured"][0]["sites"][1]["layers"] if value == "same" else value
    file.write_text(json.dumps(document))
    with pytest.raises(RequestError, match="not a calibration") as caught:
        CalibrationRecord.load(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_what_a_file_says_is_quoted_within_a_line(record: CalibrationRecord, tmp_path: Path) -> None:
    file, endless = tmp_path / "fp8.json", "x" * 10_000 + "\x1b[31m"
    replace(record, checkpoint=endless).save(file)
    with pytest.raises(RequestError, match="of another checkpoint") as of_another:
        CalibrationRecord.load(file).of("planner", Activations.ROWS, "0" * 64)
    replace(record, format=endless).save(file)
    with pytest.raises(RequestError, match="run mc-runtime calibrate again") as of_no_format:
        CalibrationRecord.load(file)
    for caught in (of_another, of_no_format):
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_what_is_no_file_is_not_waited_for_and_a_file_is_replaced_whole(record: CalibrationRecord, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RequestError, match="no regular file"):
            CalibrationRecord.load(place)
    (tmp_path / "deep.json").write_text(200_000 * "[")
    with pytest.raises(RequestError, match="not a calibration"):
        CalibrationRecord.load(tmp_path / "deep.json")
    with pytest.raises(OutputError, match="cannot be written"):
        record.save(tmp_path / "gone" / "fp8.json")
    record.save(tmp_path / "fp8.json")
    assert not list(tmp_path.glob(".mc-runtime*"))


def test_a_program_that_loses_too_much_is_not_built(
    record: CalibrationRecord, checkpoints: dict[str, Checkpoint], tmp_path: Path
) -> None:
    measured = record.of("planner", Activations.ROWS, record.sha256)
    program = program_of(checkpoints["metacanvas"], "planner", calibration_inputs(checkpoints["metacanvas"], "planner"))
    hopeless: Sensitivity = replace(
        measured, error=0.0, sites=tuple(replace(site, kept=site.kept or "loss") for site in measured.sites)
    )
    with pytest.raises(EngineError, match=r"no layers in FP8 lose as little as 0\.06.*build it in bf16"):
        apply_fp8(program, hopeless)
    replace(record, measured=(hopeless,)).save(tmp_path / "fp8.json")
    choice = LayerChoice(checkpoints["metacanvas"], tmp_path / "fp8.json", force=False)
    with pytest.raises(EngineError, match="no layers in FP8 lose as little"):  # before anything is loaded
        choice.facts("planner", EngineChoice("inductor-cuda", Precision.FP8))
    other = replace(measured, sites=(replace(measured.sites[1], layers=("planner.missing",), kept=None),))
    with pytest.raises(RequestError, match=r"a layer planner.missing that this program has not"):
        apply_fp8(program, other)


@pytest.mark.parametrize(("options", "said"), [
    ({"engines": {"vae_decoder": EngineChoice("tensorrt-rtx", Precision.FP8)}}, "planner and step; take tensorrt-rtx:bf16"),
    ({"target": "tensorrt-rtx", "precision": Precision.FP8, "step_cache": True}, "step=tensorrt-rtx:bf16, or leave --cache"),
    ({"calibration": Path("fp8.json")}, "--calibration: is of fp8 and int4 engines; say --precision fp8"),
    ({"compute_capabilities": ("8.9",)}, "--compute-capability: .* no engine here is a plan; say --target tensorrt-rtx"),
    ({"target": "inductor-cuda", "precision": Precision.FP8, "compute_capabilities": ("8.9",)}, "no engine here is a plan"),
    ({"target": "onnxruntime", "precision": Precision.FP8}, "onnxruntime has no fp8.*inductor-cuda:fp8"),
])  # fmt: skip
def test_what_fp8_is_not_for_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        BuildOptions(**options)


def test_a_bundle_in_fp8_has_the_other_engines_in_bf16() -> None:
    options = BuildOptions(target="tensorrt-rtx", precision=Precision.FP8)
    assert {name: options.choice(name).precision.value for name in ("planner", "step", "vae_decoder", "vision")} == {
        "planner": "fp8", "step": "fp8", "vae_decoder": "bf16", "vision": "bf16"
    }  # fmt: skip


def test_options_of_a_calibration_are_checked() -> None:
    with pytest.raises(RequestError, match="FP8 and INT4 are for planner and step"):
        CalibrationOptions(components=("vae_decoder",))
    with pytest.raises(RequestError, match="between 0 and 1"):
        CalibrationOptions(loss=0.0)


def test_a_stock_checkpoint_has_no_planner(checkpoints: dict[str, Checkpoint]) -> None:
    with pytest.raises(RequestError, match="has no planner; it has step"):
        calibrate(checkpoints["stock"], CalibrationOptions(components=("planner",)))
