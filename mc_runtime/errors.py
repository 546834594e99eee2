"""Every error a user of mc-runtime can meet, each with the exit code the command gives it.

A message is one line: what is wrong, which file or argument, and the mend. Anything else is our bug.
"""

from __future__ import annotations

import reprlib
from typing import Any, ClassVar

_LONGEST_NAME = 200


def shown(value: Any) -> str:
    """A value of the caller's as a message can quote it: on one line, of bounded length, whatever it is."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return f"({type(value).__name__} too long to show)"


def printable(text: str) -> str:
    """The text on one line, without what would command a terminal: names out of files may hold anything."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.splitlines()))


def named(text: str) -> str:
    """A name, of a file or out of one, as a message can say it: itself, unless it is endless or would command the terminal."""
    return text if text.isprintable() and 0 < len(text) <= _LONGEST_NAME else shown(text)


class McRuntimeError(Exception):
    """Base of all typed errors; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class RequestError(McRuntimeError, ValueError):
    """The caller asked for something that cannot be served: a size, a prompt, a seed, an option."""

    exit_code = 2


class OutputError(RequestError):
    """A result cannot be written: the path is not writable, or the disk is full."""


class BundleError(McRuntimeError):
    """A bundle is missing, damaged, of another version, or made for another machine."""

    exit_code = 3


class CheckpointError(McRuntimeError):
    """A checkpoint is incomplete, or a tensor or a key in it is not what it must be."""

    exit_code = 3


class EngineError(McRuntimeError):
    """An engine failed to build, to load or to run, or produced numbers that are not finite."""

    exit_code = 4


class Cancelled(McRuntimeError):  # noqa: N818  # an outcome the caller asked for, not a fault
    """The caller's `cancel` stopped the work between two steps."""

    exit_code = 130
