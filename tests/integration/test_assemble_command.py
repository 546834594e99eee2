"""`mc-runtime assemble`: a planner and a stock pipeline become a checkpoint that loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mc_runtime.cli.main import cli

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(stock pipeline, planner folder with its processor's files)."""
    from tests.factories import tiny_planner, tiny_processors, tiny_stock_sana

    folder = tmp_path_factory.mktemp("parts")
    planner = folder / "planner"
    tiny_planner(0).save_pretrained(planner)
    for processor in tiny_processors():
        processor.save_pretrained(planner)
    return tiny_stock_sana(folder / "stock"), planner


def assemble(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["assemble", *map(str, arguments)], prog_name="mc-runtime")


def test_makes_a_checkpoint(parts: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline, planner = parts
    out = tmp_path / "checkpoint"
    result = assemble("--pipeline", pipeline, "--planner", planner, "-o", out, "--conditioning", "text_encoder", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["checkpoint"] == str(out)
    assert document["conditioning"] == "text_encoder"

    from mc_export.checkpoint.load import load_checkpoint

    made = load_checkpoint(out)
    assert made.sha256 == document["sha256"]
    assert not made.is_stock


@pytest.mark.parametrize("missing", ["vae/config.json", "transformer/config.json", "model_index.json"])
def test_a_missing_part_is_named_and_nothing_is_written(parts: tuple[Path, Path], tmp_path: Path, missing: str) -> None:
    pipeline, planner = parts
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    (broken / missing).unlink()
    out = tmp_path / "checkpoint"
    result = assemble("--pipeline", broken, "--planner", planner, "-o", out)
    assert result.exit_code == 3
    assert missing in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not out.exists()


def test_a_folder_that_holds_something_else_is_left_alone(parts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = assemble("--pipeline", parts[0], "--planner", parts[1], "-o", tmp_path)
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
