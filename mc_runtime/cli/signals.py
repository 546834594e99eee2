"""Ctrl-C and SIGTERM, which service managers send, end a command alike: it cleans up and leaves with 130."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt in the main thread on SIGTERM and Ctrl-C; elsewhere no signal can be set, and nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # whoever ignores Ctrl-C goes on doing so
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: a library set it in C, and Python cannot set that again
                signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that got lost: Python drops one that falls into a destructor or a callback of a library.

    Long work asks at every stage.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
