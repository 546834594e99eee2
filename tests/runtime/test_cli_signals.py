"""SIGTERM ends a command as Ctrl-C does, and neither is lost; every test is a process, so that a signal ends no test runner."""

from __future__ import annotations

import subprocess
import sys
import textwrap

END_MYSELF = """
    import os, signal, threading, time

    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in a shell's background inherit another

    def end_myself():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # the signal arrives during this
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """The script in a Python of its own."""
    code = textwrap.dedent(END_MYSELF) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_signals_interrupt_and_what_was_before_comes_back() -> None:
    ran = run("""
        from mc_runtime.cli.signals import signals_interrupt

        mine = lambda *_: None
        signal.signal(signal.SIGTERM, mine)
        try:
            with signals_interrupt():
                end_myself()
        except KeyboardInterrupt:
            print("interrupted", signal.getsignal(signal.SIGTERM) is mine)
    """)
    assert ran.stdout == "interrupted True\n", ran.stderr


def test_an_interruption_that_python_drops_is_raised_at_the_next_stage() -> None:
    ran = run("""
        from mc_runtime.cli.signals import raise_if_interrupted, signals_interrupt

        class Library:
            def __del__(self):
                end_myself()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.SIGTERM = number
            with signals_interrupt():
                raise_if_interrupted()
                Library()
                try:
                    raise_if_interrupted()
                except KeyboardInterrupt:
                    print("interrupted")
        print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    """)
    assert ran.stdout == "interrupted\ninterrupted\nTrue\n", ran.stderr


def test_a_handler_that_python_did_not_set_is_no_obstacle() -> None:
    ran = run("""
        signal.signal = lambda number, handler: None  # what it says of a handler set by a library in C
        from mc_runtime.cli.signals import signals_interrupt

        with signals_interrupt():
            pass
        print("left")
    """)
    assert ran.stdout == "left\n", ran.stderr


def test_a_thread_changes_nothing() -> None:
    ran = run("""
        from mc_runtime.cli.signals import signals_interrupt

        before, seen = signal.getsignal(signal.SIGTERM), []

        def work():
            with signals_interrupt():
                seen.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print(seen == [before])
    """)
    assert ran.stdout == "True\n", ran.stderr


def test_every_command_leaves_with_130() -> None:
    ran = run("""
        import click
        from mc_runtime.cli import main as cli_main

        cli_main.LazyCommands.get_command = lambda self, ctx, name: click.Command("doctor", callback=end_myself)
        cli_main.cli(["doctor"], prog_name="mc-runtime")
    """)
    assert ran.returncode == 130
    assert ran.stderr == "Error: interrupted; nothing was left half-written\n"
