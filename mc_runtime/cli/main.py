"""Entry point of `mc-runtime`: finds the command, runs it, turns what it raises into one line and an exit code.

Exit codes: 0 done; 1 a fault of ours; 2 usage or a request that cannot be served; 3 bad bundle or checkpoint;
4 an engine failed; 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import click

from mc_runtime import __version__
from mc_runtime.cli.signals import signals_interrupt
from mc_runtime.errors import Cancelled, McRuntimeError, printable

#: Command name -> the module whose `command` it is. Order is the order of a first use.
COMMANDS = {
    "build": "mc_runtime.cli.build",
    "generate": "mc_runtime.cli.generate",
    "inspect": "mc_runtime.cli.inspect",
    "bench": "mc_runtime.cli.bench",
    "doctor": "mc_runtime.cli.doctor",
    "assemble": "mc_runtime.cli.assemble",
    "calibrate": "mc_runtime.cli.calibrate",
}

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class LazyCommands(click.Group):
    """A group that imports a command's module when it is asked for, and reports errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of `COMMANDS`; nothing is imported."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        found: click.Command = import_module(module).command
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; Ctrl-C and SIGTERM become `Cancelled`, said in one line like every other error."""
        try:
            with signals_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal shows ^C at the start of this line
            raise Cancelled("interrupted; nothing was left half-written") from None

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run one command line and leave with its exit code (SystemExit), as click's own `main` does."""
        argv = list(sys.argv[1:] if args is None else args)
        if not extra.pop("standalone_mode", True):
            return super().main(args=argv, standalone_mode=False, **extra)
        extra["prog_name"] = extra.get("prog_name") or "mc-runtime"
        try:
            code = super().main(args=argv, standalone_mode=False, **extra)
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            sys.exit(_report(error, argv))
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, argv: list[str]) -> int:
    """Print `error` on stderr in one line (under --debug after its traceback) and return its exit code."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return EXIT_USAGE
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away: nothing is wrong, and nobody is left to be told.
        sys.stderr.close()
        return 0
    kind, code, message = _described(error)
    if "--debug" in options:
        traceback.print_exception(error)
    click.echo(f"Error: {message}", err=True)
    if _wants_json(options):
        click.echo(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}, indent=2))
    return code


def _wants_json(options: list[str]) -> bool:
    """Whether standard output is to have a document: `bench` has it there only under `--json -`, else in a file."""
    if options[:1] == ["bench"]:
        return "--json=-" in options or ("--json", "-") in pairwise(options)
    return "--json" in options


def _described(error: BaseException) -> tuple[str, int, str]:
    """(kind, exit code, message on one line) of any exception a command can raise."""
    if isinstance(error, McRuntimeError):
        return type(error).__name__, error.exit_code, _one_line(str(error))
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "mc-runtime"
        return "UsageError", EXIT_USAGE, f"{_one_line(error.format_message())} See '{where} --help'."
    if isinstance(error, click.ClickException):
        return type(error).__name__, error.exit_code, _one_line(error.format_message())
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "Cancelled", EXIT_INTERRUPTED, "interrupted before anything was done"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "OutputError", EXIT_USAGE, "the disk is full, or standard output is; free some space and try again"
    what = _one_line(f"{type(error).__name__}: {error}").rstrip(".")
    mend = "This is a fault of mc-runtime: run the same command with --debug and report what it prints."
    return "InternalError", EXIT_FAULT, f"{what}. {mend}"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=LazyCommands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mc-runtime")
def cli() -> None:
    """Build a checkpoint into a bundle of engines once; make pictures from it with no model code.

    \b
    A picture from the demo checkpoint that a checkout of the project ships:
      mc-runtime generate demo "a red circle left of a blue square" -o out.png

    \b
    Your own checkpoint (a MetaCanvas directory, or a stock diffusers pipeline):
      mc-runtime build ./checkpoint -o ./bundle --target openvino --precision bf16
      mc-runtime generate ./bundle "two green triangles above a yellow square" -o out.png

    \b
    What can this machine run?
      mc-runtime doctor

    Every command takes --json (one JSON document on standard output) and --debug (a traceback with an
    error). Exit codes: 0 done, 1 a fault of mc-runtime, 2 usage, 3 bad bundle or checkpoint, 4 engine,
    130 interrupted.
    """


def main() -> None:
    """Console entry point."""
    cli.main()


if __name__ == "__main__":
    main()
