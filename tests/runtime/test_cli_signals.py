"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
import time

import click
import pytest
from click.testing import CliRunner

from mc_runtime.cli import main as cli_main
from mc_runtime.cli.signals import sigterm_interrupts


def end_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # the signal arrives during this


def test_sigterm_interrupts_and_what_was_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        end_myself()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_changes_nothing() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with sigterm_interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_every_command_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    command = click.Command("doctor", callback=end_myself)
    monkeypatch.setattr(cli_main.LazyCommands, "get_command", lambda self, ctx, name: command)
    result = CliRunner().invoke(cli_main.cli, ["doctor"], prog_name="mc-runtime")
    assert result.exit_code == 130
    assert result.stderr == "Error: interrupted; nothing was left half-written\n"
