"""`mc-runtime bench`: the report's shape, its checks, its files. How long anything takes is not tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mc_runtime import bench as bench_module
from mc_runtime.cli import build_half
from mc_runtime.cli.main import cli
from mc_runtime.runtime.planning import Planning
from tests.runtime.fake_bundle import write_fake_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


def bench(*arguments: object) -> Result:
    line = ["bench", *map(str, arguments), "--prompt", "a red circle", "--runs", "3"]
    return CliRunner().invoke(cli, line, prog_name="mc-runtime")


class Rival(bench_module.BundleContestant):
    """A contestant that draws the bundle's own picture, `off` away from it."""

    name = "eager"
    off = 0.0

    def latents(self) -> np.ndarray:
        return super().latents() + np.float32(self.off)


@pytest.fixture
def rival(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> type[Rival]:
    from mc_runtime.runtime.runtime import Runtime

    monkeypatch.setattr(build_half, "missing_modules", list)
    monkeypatch.setattr(
        bench_module, "TorchContestant", lambda checkpoint, request, compiled: Rival(Runtime.load(bundle), request)
    )
    return Rival


def test_report_on_standard_output(bundle: Path) -> None:
    result = bench(bundle, "--json", "-", "--steps", 2, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["runs"] == 3
    assert report["request"]["steps"] == 2
    assert report["request"]["size"] == [32, 32]
    stages = report["results"]["bundle"]
    assert {"plan", "denoise", "decode", "pixels", "engines", "total"} <= set(stages)
    assert all(value["min"] <= value["median"] <= value["max"] for value in stages.values())
    assert 0 <= report["host_share"] <= 1
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["numpy"]


def test_every_round_plans_anew(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    run = Planning._run
    monkeypatch.setattr(Planning, "_run", lambda self, *arguments: planned.append(arguments[0]) or run(self, *arguments))
    assert bench(bundle, "--json", "-").exit_code == 0
    # A warm-up and three rounds, each with the prompt and the empty negative prompt.
    assert planned == ["planner"] * 2 * (1 + 3)


def test_text_and_files(bundle: Path, tmp_path: Path) -> None:
    result = bench(bundle, "--json", tmp_path / "report.json", "--chart", tmp_path / "chart.png")
    assert result.exit_code == 0, result.stderr
    assert "denoise" in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["results"]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_rival_is_checked_and_timed(bundle: Path, rival: type[Rival]) -> None:
    result = bench(bundle, "--against", "eager", "--checkpoint", "c", "--json", "-")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["check"]["eager"] == {"relative_l2": 0.0, "max_abs": 0.0}
    assert report["speedup"]["eager"] > 0
    assert set(report["results"]) == {"bundle", "eager"}


def test_a_rival_that_draws_something_else_is_not_timed(
    bundle: Path, rival: type[Rival], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rival, "off", 10.0)
    result = bench(bundle, "--against", "eager", "--checkpoint", "c")
    assert result.exit_code == 4
    assert "was it built from this checkpoint?" in result.stderr
    assert result.stdout == ""


def test_against_needs_a_checkpoint(bundle: Path) -> None:
    result = bench(bundle, "--against", "eager")
    assert result.exit_code == 2
    assert "--checkpoint" in result.stderr


@pytest.mark.parametrize("option", ["--json", "--chart"])
def test_outputs_are_checked_before_anything_is_timed(bundle: Path, tmp_path: Path, option: str) -> None:
    result = bench(bundle, option, tmp_path / "missing" / "x.png")
    assert result.exit_code == 2
    assert result.stdout == ""


def test_chart_without_matplotlib(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_runtime.cli import bench as command_module

    monkeypatch.setattr(command_module, "find_spec", lambda name: None)
    result = bench(bundle, "--chart", tmp_path / "chart.png")
    assert result.exit_code == 4
    assert "pip install matplotlib" in result.stderr
