"""`mc-runtime doctor`, and the words of the commands whose libraries are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mc_runtime.cli import build_half, demo
from mc_runtime.cli.main import cli


def test_json_names_every_target_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_RUNTIME_CACHE", str(tmp_path))
    (tmp_path / "x").write_bytes(b"12345")
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert set(report["targets"]) == {"onnxruntime", "openvino", "inductor", "inductor-cuda", "tensorrt", "tensorrt-rtx"}
    for target in report["targets"].values():
        assert target["ready"] or target["reason"]
    assert report["cache"] == {"path": str(tmp_path), "bytes": 5}
    assert report["machine"]["cores"] >= 1


@pytest.mark.parametrize("asked", ["", "g++-that-is-not-there"])
def test_a_missing_compiler_is_told(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", asked)
    if not asked:
        monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(cli, ["doctor"])
    assert "no C++ compiler, which building for inductor needs; apt install g++" in result.stdout
    assert json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["compiler"]["path"] is None


def test_text_says_what_is_missing_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_half, "missing_modules", lambda: ["torch", "nncf"])
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0
    assert "torch, nncf not installed" in result.stdout
    assert build_half.MEND in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", ".", "-o", "bundle"],
        ["assemble", "--pipeline", "p", "--planner", "q", "-o", "c"],
        ["bench", "b", "--against", "eager", "--checkpoint", "c"],
    ],
)
def test_without_the_build_half_a_command_says_what_to_install(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_half, "missing_modules", lambda: ["torch"])
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 4
    assert "mc-runtime[build]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command", [["generate", "NAME", "a circle"], ["inspect", "NAME"], ["bench", "NAME"], ["build", "NAME", "-o", "b"]]
)
@pytest.mark.parametrize("name", ["demo", "demo-edit", "demo-video"])
def test_demo_without_a_checkout(name: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo.CHECKPOINTS, name, tmp_path / "nowhere")
    result = CliRunner().invoke(cli, [name if word == "NAME" else word for word in command])
    assert result.exit_code == 3
    assert f"`{name}`" in result.stderr
    assert "checkout" in result.stderr
