"""What the commands that need the build half share: whether it is installed, and running it quietly and interruptibly."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mc_runtime.cli.signals import signals_interrupt
from mc_runtime.errors import EngineError

#: What `build`, `assemble` and `bench --against` import: (module, distribution).
MODULES = (
    ("torch", "torch"),
    ("diffusers", "diffusers"),
    ("transformers", "transformers"),
    ("onnx", "onnx"),
    ("onnxscript", "onnxscript"),
    ("nncf", "nncf"),
    ("peft", "peft"),
    ("pydantic", "pydantic"),
)
MEND = "pip install torch==2.13.0 && pip install 'mc-runtime[build]'"


def missing_modules() -> list[str]:
    """Distributions of the build half that this environment lacks; nothing is imported."""
    return [distribution for module, distribution in MODULES if not _installed(module)]


def require(what: str) -> None:
    """Raise EngineError with the line to install, where the build half is not there for `what`."""
    missing = missing_modules()
    if missing:
        raise EngineError(f"{what} needs {', '.join(missing)}, which production does without; install with: {MEND}")


@contextmanager
def at_work() -> Iterator[None]:
    """Run the build half: no telemetry, no library's warnings (`python -W` shows them), SIGTERM cleans up as Ctrl-C does.

    Commands have their SIGTERM handled already; the process that builds the demo's bundle has it from here.
    """
    # NNCF reports its use over the network unless it believes itself in a test; onnxruntime, unless this is set.
    os.environ.setdefault("NNCF_CI", "1")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers logs that it does without torchvision, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with signals_interrupt(), warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
