"""`mc-runtime inspect`: facts for a person, the manifest for a program, and damage found by --verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mc_runtime.cli.main import cli
from tests.runtime.fake_bundle import write_fake_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "bundle")


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], prog_name="mc-runtime")


def test_text_names_every_engine_and_the_sizes(bundle: Path) -> None:
    result = inspect(bundle)
    assert result.exit_code == 0, result.stderr
    for word in ("planner", "step", "vae_decoder", "onnxruntime fp32", "32x32 by default", "any multiple of 8 from 16 to 128"):
        assert word in result.stdout


def test_json_is_the_manifest(bundle: Path) -> None:
    result = inspect(bundle, "--json", "--verify")
    document = json.loads(result.stdout)
    assert document["verified"] is True
    assert document["manifest"] == json.loads((bundle / "manifest.json").read_text())


def test_an_altered_file_is_found_only_by_reading_it(bundle: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert inspect(bundle).exit_code == 0
    result = inspect(bundle, "--verify")
    assert result.exit_code == 3
    assert "tokenizer.json: altered" in result.stderr


def test_a_missing_file_is_found_at_once(bundle: Path) -> None:
    (bundle / "sampler.safetensors").unlink()
    result = inspect(bundle, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["kind"] == "BundleError"


def test_no_bundle(tmp_path: Path) -> None:
    assert inspect(tmp_path).exit_code == 3
