"""Directories appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mc_runtime.bundle import atomic
from mc_runtime.bundle.atomic import staged_directory
from mc_runtime.errors import OutputError


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(stage: Path, text: str = "new") -> None:
    (stage / "sub").mkdir()
    (stage / "sub" / "engine").write_text(text)
    (stage / "manifest.json").write_text(text)


def test_new_directory_with_missing_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "bundle"
    with staged_directory(target) as stage:
        write(stage)
        assert not target.exists()
    assert (target / "sub" / "engine").read_text() == "new"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


@pytest.mark.parametrize("exchange", [True, False], ids=["swapped", "renamed"])
def test_old_directory_is_replaced(old: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda stage, target: False)
    with staged_directory(old, marker="manifest.json") as stage:
        write(stage)
        assert (old / "manifest.json").read_text() == "old"
    assert names(old) == ["manifest.json", "sub"]
    assert (old / "manifest.json").read_text() == "new"
    assert names(old.parent) == ["bundle"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), SystemExit(1)])
def test_error_or_interruption_leaves_the_old_one(old: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with staged_directory(old) as stage:
            write(stage)
            raise error

    with pytest.raises(type(error)) as caught:
        interrupted()
    assert caught.value is error
    assert names(old) == ["manifest.json"]
    assert (old / "manifest.json").read_text() == "old"
    assert names(old.parent) == ["bundle"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_an_output_error(old: Path, error: Exception) -> None:
    with pytest.raises(OutputError, match="disk is full") as caught, staged_directory(old):
        raise error
    assert caught.value.__cause__ is error
    assert names(old) == ["manifest.json"]
    assert names(old.parent) == ["bundle"]


LIMITED = """
import resource, sys
from pathlib import Path
from mc_runtime.bundle.atomic import staged_directory
from mc_runtime.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    with staged_directory(Path(sys.argv[1])) as stage:
        (stage / "engine").write_bytes(bytes(1 << 21))
except OutputError as error:
    print(error)
"""


def test_a_limit_on_files_is_an_output_error(tmp_path: Path) -> None:
    """A real one, in a process of its own: the system ends what writes a larger file, but for Python, which gets an error.

    Not here: a library that was imported before may have taken Python's way with the signal back.
    """
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "bundle")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ulimit -f" in found.stdout
    assert names(tmp_path) == []


def test_a_full_disk_that_a_library_did_not_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_a_file() -> None:
        with atomic.full_disk_is_said(tmp_path):
            raise RuntimeError("Wire format was corrupt")

    with pytest.raises(RuntimeError, match="Wire format"):
        half_a_file()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage._replace(free=4096))
    with pytest.raises(OutputError, match="disk is full"), staged_directory(tmp_path / "bundle"):
        half_a_file()


def test_full_disk_while_flushing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"), staged_directory(old) as stage:
        write(stage)
    assert (old / "manifest.json").read_text() == "old"
    assert names(old.parent) == ["bundle"]


def test_failed_second_rename_brings_the_old_one_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails_once(self: Path, target: Path) -> Path:
        if Path(target) == old and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda stage, target: False)
    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(KeyboardInterrupt), staged_directory(old) as stage:
        write(stage)
    assert (old / "manifest.json").read_text() == "old"
    assert names(old.parent) == ["bundle"]


def test_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("dear")
    with pytest.raises(OutputError, match=r"no manifest\.json"), staged_directory(tmp_path, marker="manifest.json"):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="is a file"), staged_directory(tmp_path / "holiday.jpg"):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["holiday.jpg"]


def test_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with staged_directory(tmp_path / "bundle", marker="manifest.json") as stage:
        write(stage)
    assert names(tmp_path / "bundle") == ["manifest.json", "sub"]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), staged_directory(tmp_path / "file" / "bundle"):
        pytest.fail("the block must not run")


def test_permission_denied_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**options: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", denied)
    with pytest.raises(OutputError, match="not writable"), staged_directory(tmp_path / "bundle"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("there", [True, False])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "v1").mkdir()
        write(tmp_path / "v1", "old")
    (tmp_path / "current").symlink_to("v1")
    with staged_directory(tmp_path / "current") as stage:
        write(stage, "new")
    assert (tmp_path / "v1" / "manifest.json").read_text() == "new"
    assert (tmp_path / "current").is_symlink()
    assert names(tmp_path) == ["current", "v1"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError), staged_directory(tmp_path / "loop" / "bundle"):
        pytest.fail("the block must not run")


def test_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long"), staged_directory(tmp_path / ("n" * 300)):
        pytest.fail("the block must not run")


def test_of_two_that_write_one_place_the_last_stays_and_both_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place is free when the first looks, and taken by the second when it puts its directory there."""
    flush = atomic._flush

    def second_is_faster(stage: Path) -> None:
        monkeypatch.setattr(atomic, "_flush", flush)
        with staged_directory(tmp_path / "bundle") as other:
            write(other, "second")
        flush(stage)

    monkeypatch.setattr(atomic, "_flush", second_is_faster)
    with staged_directory(tmp_path / "bundle") as stage:
        write(stage, "first")
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["bundle"]


def test_sweep_takes_what_nobody_writes_whatever_it_was_for(tmp_path: Path) -> None:
    (tmp_path / ".one.staged-dead").mkdir()
    (tmp_path / ".hidden").mkdir()
    with staged_directory(tmp_path / "bundle") as living:
        (tmp_path / ".two.staged-dead.old").mkdir()
        atomic.sweep(tmp_path)
        assert names(tmp_path) == sorted([living.name, ".hidden"])
        write(living)


def test_stage_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = atomic.fcntl.flock, []

    def sweep_first(handle: int, operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob(".bundle.staged-*"))
            swept[0].rmdir()
        real(handle, operation)

    monkeypatch.setattr(atomic.fcntl, "flock", sweep_first)
    with staged_directory(tmp_path / "bundle") as stage:
        assert stage not in swept
        write(stage, "new")
    assert names(tmp_path) == ["bundle"]


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_spared(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    (tmp_path / ".bundle.staged-dead").mkdir()
    with staged_directory(target) as living, staged_directory(target) as stage:
        assert living.exists()
        assert not (tmp_path / ".bundle.staged-dead").exists()
        write(living, "first")
        write(stage, "second")
    assert (target / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["bundle"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
