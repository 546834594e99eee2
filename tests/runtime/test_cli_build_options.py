"""What `mc-runtime build` makes of its options for GPUs; nothing is built."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner, Result

from mc_runtime.cli import build
from mc_runtime.cli.main import cli


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[build.BuildChoices]:
    choices: list[build.BuildChoices] = []

    def noted(chosen: build.BuildChoices, progress: object) -> dict[str, Any]:
        choices.append(chosen)
        return {"bundle": "b", "unchanged": False, "seconds": 1.0, "bytes": 1, "engines": []}

    monkeypatch.setattr(build, "run_build", noted)
    return choices


def run(*options: str) -> Result:
    return CliRunner().invoke(cli, ["build", "checkpoint", "-o", "bundle", *options])


@pytest.mark.parametrize(("options", "fallback", "capabilities"), [
    ((), None, ()),
    (("--fallback", "onnxruntime"), ("onnxruntime", "fp32"), ()),
    (("--fallback", "openvino:int8", "--compute-capability", "8.9"), ("openvino", "int8"), ("8.9",)),
    (("--compute-capability", "8.9, 12.0"), None, ("8.9", "12.0")),
])  # fmt: skip
def test_choices(
    asked: list[build.BuildChoices], options: tuple[str, ...], fallback: object, capabilities: tuple[str, ...]
) -> None:
    result = run("--target", "tensorrt-rtx", "--precision", "fp16", *options)
    assert result.exit_code == 0, result.output
    assert (asked[0].target, asked[0].precision) == ("tensorrt-rtx", "fp16")
    assert (asked[0].fallback, asked[0].capabilities) == (fallback, capabilities)


@pytest.mark.parametrize(("given", "message"), [
    ("tensor", "'tensor' is no target"), ("onnxruntime:int3", "'int3' is no precision"), (":fp32", "'' is no target"),
])  # fmt: skip
def test_a_fallback_that_is_none(asked: list[build.BuildChoices], given: str, message: str) -> None:
    result = run("--fallback", given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not asked


def test_one_component_named_twice(asked: list[build.BuildChoices]) -> None:
    result = run("--engine", "step=openvino:int8", "--engine", "planner=openvino:int8", "--engine", "step=openvino:bf16")
    assert result.exit_code == 2
    assert "--engine step: is given twice" in result.stderr
    assert not asked
