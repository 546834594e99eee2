"""`mc-runtime calibrate`: the file, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mc_runtime.cli.main import cli
from tests.factories import tiny_metacanvas_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("calibrated") / "checkpoint", seed=37, layers=1)


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *map(str, arguments)], prog_name="mc-runtime")


def test_writes_what_it_prints(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "fp8.json"
    result = calibrate(checkpoint, "-o", file, "--component", "planner", "--loss", "0.06", "--seed", "3", "--json")
    assert result.exit_code == 0, result.stderr
    document, written = json.loads(result.stdout), json.loads(file.read_text())
    assert [(one["component"], one["activations"], one["loss"]) for one in written["measured"]] == [
        ("planner", "rows", 0.06), ("planner", "tensor", 0.06)
    ]  # fmt: skip
    assert (document["seed"], document["sha256"]) == (3, written["sha256"])
    assert [site["layers"] for site in document["measured"][0]["sites"]] == [
        site["layers"] for site in written["measured"][0]["sites"]
    ]


def test_shows_the_dearest_layers(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "fp8.json"
    result = calibrate(checkpoint, "-o", file, "--component", "planner", "--scales", "rows")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("planner, a scale for each row: all in FP8 lose 0.")
    assert lines[-1] == str(file)
    sites = json.loads(file.read_text())["measured"][0]["sites"]
    assert max(sites, key=lambda site: site["error"])["layers"][0] in lines[1]
    assert "#" * 24 in lines[1]


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("--loss", "2"), 2, "loss must be between 0 and 1"),
    (("--component", "vae_decoder"), 2, "'vae_decoder' is not one of"),
])  # fmt: skip
def test_refuses(checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    result = calibrate(checkpoint, "-o", tmp_path / "fp8.json", *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert not (tmp_path / "fp8.json").exists()


def test_a_file_that_cannot_be_written_costs_no_waiting(tmp_path: Path) -> None:
    result = calibrate(tmp_path / "no-checkpoint", "-o", tmp_path / "missing" / "fp8.json")
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr
