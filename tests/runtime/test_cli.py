"""The command's frame: help, laziness, errors in one line, exit codes, one JSON document."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from mc_runtime import errors
from mc_runtime.cli import main as cli_main
from mc_runtime.cli import options
from mc_runtime.cli.main import COMMANDS, cli


def run(*arguments: str) -> Result:
    """One command line, as a shell would run it."""
    return CliRunner().invoke(cli, list(arguments), prog_name="mc-runtime")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """A command `doctor` that raises what the test sets."""

    def install(error: BaseException) -> None:
        @click.command("doctor")
        @options.json_option
        @options.debug_option
        def command(as_json: bool) -> None:
            raise error

        group = cli_main.LazyCommands.get_command
        monkeypatch.setattr(
            cli_main.LazyCommands,
            "get_command",
            lambda self, ctx, name: command if name == "doctor" else group(self, ctx, name),
        )

    return install


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"mc-runtime {command} " in result.stdout
    assert "Example" in result.stdout


def test_help_lists_every_command_in_the_order_of_a_first_use() -> None:
    result = run("--help")
    assert result.exit_code == 0
    places = [result.stdout.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert "0.1.0" in result.stdout


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mc_runtime", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RequestError("steps: 0; ask for 1 or more"), 2),
        (errors.OutputError("out.png: not writable"), 2),
        (errors.BundleError("b: no manifest"), 3),
        (errors.CheckpointError("c: no such tensor"), 3),
        (errors.EngineError("step: NaN"), 4),
        (errors.Cancelled("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("oops"), 1),
    ],
)
def test_exit_code_and_one_line(failing, error: BaseException, code: int) -> None:
    failing(error)
    result = run("doctor")
    assert result.exit_code == code
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert str(error) in lines[0]
    assert result.stdout == ""


def test_full_disk_under_standard_output_is_no_fault_of_ours(failing) -> None:
    failing(OSError(errno.ENOSPC, "No space left on device"))
    result = run("doctor")
    assert result.exit_code == 2
    assert "disk is full" in result.stderr


def test_fault_of_ours_asks_for_a_report(failing) -> None:
    failing(KeyError("x"))
    result = run("doctor")
    assert "KeyError: 'x'" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_message_of_many_lines_becomes_one(failing) -> None:
    failing(errors.EngineError("first\n  second\nthird"))
    assert run("doctor").stderr == "Error: first second third\n"


def test_debug_shows_the_traceback(failing) -> None:
    failing(errors.BundleError("b: altered"))
    result = run("doctor", "--debug")
    assert result.exit_code == 3
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1] == "Error: b: altered"


def test_json_error_is_one_document(failing) -> None:
    failing(errors.BundleError("b: altered"))
    result = run("doctor", "--json")
    assert json.loads(result.stdout) == {"error": {"kind": "BundleError", "message": "b: altered", "exit_code": 3}}
    assert result.stderr == "Error: b: altered\n"


@pytest.mark.parametrize(("option", "has_document"), [("--json=-", True), ("--json=file.json", False)])
def test_json_error_of_bench_is_where_its_document_would_be(option: str, has_document: bool) -> None:
    result = run("bench", "no-such-bundle", option)
    assert result.exit_code == 3
    assert bool(result.stdout) == has_document
    assert not has_document or json.loads(result.stdout)["error"]["kind"] == "BundleError"


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["generate"],
        ["generate", "b", "p", "--no-such-option"],
        ["generate", "b", "p", "--size", "large"],
        ["generate", "b", "p", "--size", "64"],
        ["generate", "b", "p", "--steps", "many"],
        ["generate", "b", "p", "--threads", "0"],
        ["generate", "b", "p", "--threads", "100000000000"],
        ["generate", "b", "p", "--size", f"{'9' * 5000}x64"],
        ["build", "c", "-o", "b", "--target", "abacus"],
        ["build", "c", "-o", "b", "--precision", "fp7"],
        ["build", "c", "-o", "b", "--engine", "step"],
        ["build", "c", "-o", "b", "--engine", "step=openvino:fp7"],
        ["build", "c", "-o", "b", "--engine", "wheel=openvino:fp32"],
        ["build", "c"],
        ["bench", "b", "--against", "tortoise"],
        ["bench", "b", "--runs", "0"],
    ],
)
def test_usage_error_is_one_line_and_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    assert "--help" in lines[0]


def test_no_arguments_shows_help_and_is_a_usage_error() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Usage: mc-runtime" in result.stderr


def test_choices_are_those_of_the_packages() -> None:
    from mc_runtime.backends.registry import TARGETS
    from mc_runtime.bundle.manifest import Precision

    assert TARGETS == options.TARGETS
    assert tuple(Precision) == options.PRECISIONS


def test_engine_option_names_its_parts() -> None:
    choice = options.EngineOption().convert("step=openvino:int8", None, None)
    assert choice == options.EngineChoice("step", "openvino", "int8")


def test_sizes_reach_the_request_also_when_they_are_nonsense() -> None:
    assert options.Size().convert("512x768", None, None) == (512, 768)
    assert options.Size().convert("0x-5", None, None) == (0, -5)


def test_help_imports_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "PIL", "rich", "onnxruntime", "openvino", "tokenizers", "mc_export")
    code = (
        "import sys\nfrom mc_runtime.cli.main import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
