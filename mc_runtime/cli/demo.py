"""The names of the demos: bundles of the checkpoints that a checkout ships, built into the cache at first use.

The build runs in a process of its own, so that the process which draws never imports torch and never holds its memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import mc_runtime
from mc_runtime import errors
from mc_runtime.bundle.atomic import sweep
from mc_runtime.cache import cache_root
from mc_runtime.cli.output import Progress, progress_bar

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

DEMO = "demo"
_CHECKOUT = Path(mc_runtime.__file__).resolve().parents[1]
_SHAPES = _CHECKOUT / "examples" / "shapes"
CHECKPOINTS = {
    DEMO: _SHAPES / "checkpoint",
    "demo-edit": _SHAPES / "edit" / "checkpoint",
    "demo-video": _SHAPES / "video" / "checkpoint",
}
"""Every name that the command line knows, and the checkpoint it stands for."""
_BUILDERS = (_CHECKOUT / "export" / "mc_export", _CHECKOUT / "kernels" / "mc_kernels")


def bundle_path(name: str, *, quiet: bool = False) -> Path:
    """The bundle directory that BUNDLE on the command line means; `./demo` is a directory of that name."""
    return demo_bundle(name, quiet=quiet) if name in CHECKPOINTS else Path(name)


def checkpoint_path(name: str) -> str:
    """The checkpoint that CHECKPOINT on the command line means: a directory, a hub id, or a demo's."""
    return str(demo_checkpoint(name)) if name in CHECKPOINTS else name


def shipped(name: str) -> bool:
    """Whether this installation has the checkpoint of demo `name`."""
    return (CHECKPOINTS[name] / "model_index.json").is_file()


def demo_checkpoint(name: str) -> Path:
    """The shipped checkpoint of demo `name`. Raises CheckpointError where mc-runtime was installed without its checkout."""
    if not shipped(name):
        raise errors.CheckpointError(
            f"{CHECKPOINTS[name]}: the checkpoint of `{name}` ships with a checkout of the project, not with the installed "
            "package; clone the repository and install it with `pip install -e .`, or name a bundle of your own"
        )
    return CHECKPOINTS[name]


def demo_bundle(name: str, *, quiet: bool = False) -> Path:
    """The bundle of demo `name`, built first if the cache has none for its checkpoint and this version of the builder."""
    checkpoint = demo_checkpoint(name)
    bundle = cache_root() / name / _fingerprint(checkpoint)
    if _complete(bundle):
        return bundle
    with _only_one(bundle.parent), progress_bar(f"building the bundle of {name}", quiet=quiet) as progress:
        if not _complete(bundle):
            sweep(bundle.parent)
            _build_in_child(name, bundle, progress)
    return bundle


def _complete(bundle: Path) -> bool:
    # Bundles appear by one rename, so a manifest means that all of it is there.
    return (bundle / "manifest.json").is_file()


def _fingerprint(checkpoint: Path) -> str:
    """Name of a demo's bundle: a hash of the checkpoint and of the code that builds it."""
    digest = hashlib.sha256(mc_runtime.__version__.encode())
    for root, pattern in ((checkpoint, "*"), *((folder, "*.py") for folder in _BUILDERS)):
        for path in sorted(path for path in root.rglob(pattern) if path.is_file()):
            digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:20]


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: of two first uses at once, the second waits and finds the bundle built."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise errors.OutputError(
            f"{folder}: the cache cannot be written ({error.strerror}); set MC_RUNTIME_CACHE to a folder that can"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_in_child(name: str, bundle: Path, progress: Progress) -> None:
    """Build in a fresh interpreter, pass its progress on, and raise here what it raised there."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, CHECKPOINTS[name], bundle), name=f"mc-runtime build {name}")
    child.start()
    sender.close()
    outcome: tuple[str, str] | None = None
    try:
        while True:
            kind, *rest = receiver.recv()
            if kind == "progress":
                progress(*rest)
            else:
                outcome = rest[0], rest[1]
    except EOFError:
        child.join()
    finally:
        if child.is_alive():
            child.terminate()
            child.join()
    if outcome is None:
        raise errors.EngineError(
            f"building the bundle of {name} stopped without a word (exit status {child.exitcode}); "
            f"if memory ran out, free some, or see what `mc-runtime build {name} -o {name}-bundle` says"
        )
    kind, message = outcome
    if kind == "done":
        return
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.McRuntimeError):
        raise known(message)
    raise RuntimeError(f"{kind}: {message}")


def _child(sender: Connection, checkpoint: Path, bundle: Path) -> None:
    """Runs in the child: sends ("progress", done, total, what) and at last ("outcome", name, message).

    A terminal's Ctrl-C reaches both processes: the parent alone heeds it and ends the child, so that its cleaning up is not
    interrupted a second time.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from mc_runtime.cli.build import BuildChoices, run_build

    def progress(done: float, total: float, what: str = "") -> None:
        sender.send(("progress", done, total, what))

    try:
        run_build(BuildChoices(checkpoint=str(checkpoint), output=bundle), progress)
        sender.send(("outcome", "done", ""))
    except KeyboardInterrupt:
        sender.send(("outcome", "Cancelled", "interrupted; nothing was left half-written"))
    except BrokenPipeError:
        pass  # the parent was killed, and nobody is left to be told
    except Exception as error:
        sender.send(("outcome", type(error).__name__, str(error)))
