"""The engine cache, the options and the progress of a build, without building anything."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mc_export.build import cache
from mc_export.build.options import BuildOptions, EngineChoice
from mc_export.build.progress import BuildEvent, ProgressLog, State
from mc_runtime.bundle import atomic
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import OutputError, RequestError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MC_RUNTIME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(directory: Path) -> dict[str, str]:
    (directory / "a.bin").write_bytes(b"engine")
    return {"note": "kept"}


def test_an_entry_comes_back_whole(tmp_path: Path) -> None:
    key = cache.content_key({"weights": "1"})
    assert cache.lookup(key) is None
    built = cache.build_entry(key, write)
    found = cache.lookup(key)
    assert found == built
    assert found.notes == {"note": "kept"}
    cache.copy_files(found, tmp_path / "out")
    assert (tmp_path / "out" / "a.bin").read_bytes() == b"engine"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.bin"]


def test_a_copy_that_is_changed_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    entry = cache.build_entry(cache.content_key({}), write)
    cache.copy_files(entry, tmp_path / "out")
    (tmp_path / "out" / "a.bin").write_bytes(b"spoilt")
    assert cache.lookup(cache.content_key({})) is not None


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "entry"])
def test_a_damaged_entry_is_not_used(damage: str) -> None:
    key = cache.content_key({})
    entry = cache.build_entry(key, write)
    file = entry.directory / ("entry.json" if damage == "entry" else "a.bin")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "truncated" else b"engina")
    assert cache.lookup(key) is None
    assert not entry.directory.exists()


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_or_interrupted_build_leaves_no_entry(root: Path, error: BaseException) -> None:
    def fail(directory: Path) -> dict[str, str]:
        write(directory)
        raise error

    with pytest.raises(type(error)):
        cache.build_entry(cache.content_key({}), fail)
    assert cache.lookup(cache.content_key({})) is None
    assert [file for _, _, files in os.walk(root) for file in files] == []


def test_a_cache_that_is_full_or_read_only_is_named_as_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path) -> dict[str, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_only(**options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def nested(directory: Path) -> dict[str, str]:
        cache.build_entry(cache.content_key({"inner": 1}), full)
        return {}

    for make in (full, nested):
        with pytest.raises(OutputError, match=r"disk is full .*\(this is the cache: MC_RUNTIME_CACHE [^(]*$"):
            cache.build_entry(cache.content_key({}), make)
    monkeypatch.setattr(atomic.tempfile, "mkdtemp", read_only)
    with pytest.raises(OutputError, match=r"not writable.*MC_RUNTIME_CACHE"):
        cache.build_entry(cache.content_key({}), write)


def test_what_a_killed_build_left_is_swept_though_its_entry_is_never_made_again(root: Path) -> None:
    kept = cache.build_entry(cache.content_key({}), write)
    (kept.directory.with_name(f".{kept.directory.name}.staged-dead") / "half").mkdir(parents=True)
    (root / "engines" / "00" / ".00.staged-dead").mkdir(parents=True)
    cache.sweep_cache()
    assert list(root.rglob("*.staged-*")) == []
    assert cache.lookup(cache.content_key({})) is not None


def test_the_key_covers_facts_sources_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.content_key({"weights": "1", "limits": {"max_batch": 1}})
    assert key == cache.content_key({"limits": {"max_batch": 1}, "weights": "1"})
    assert key != cache.content_key({"weights": "2", "limits": {"max_batch": 1}})
    monkeypatch.setattr(cache, "library_versions", lambda: {"torch": "0"})
    changed = cache.content_key({"weights": "1", "limits": {"max_batch": 1}})
    monkeypatch.setattr(cache, "source_version", lambda: "another")
    assert len({key, changed, cache.content_key({"weights": "1", "limits": {"max_batch": 1}})}) == 3


@pytest.mark.parametrize("changed", ["reference/pipeline.py", "checkpoint/load.py", "rewrites/kernels.py"])
def test_every_source_of_ours_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    before = cache.source_version.__wrapped__()
    copy = tmp_path / "mc_export"
    shutil.copytree(cache.mc_export.__path__[0], copy)
    monkeypatch.setattr(cache.mc_export, "__path__", [str(copy)])
    assert cache.source_version.__wrapped__() == before
    (copy / changed).write_text("# another\n")
    assert cache.source_version.__wrapped__() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tensorflow"}, "target 'tensorflow' is unknown; choose onnxruntime or openvino"),
        ({"precision": Precision.BF16}, "onnxruntime has no bf16; choose fp32, int8, or openvino:bf16"),
        ({"engines": {"unet": EngineChoice("openvino", Precision.FP32)}}, "component 'unet' is unknown"),
        ({"max_batch": 0}, "max_batch must be 1 to 256, got 0"),
        ({"max_steps": 0}, "max_steps must be 1 to 1000, got 0"),
        ({"sizes": ((0, 512),)}, "size 0x512: height and width must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        BuildOptions(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_component_can_have_its_own_target_and_precision() -> None:
    own = EngineChoice("openvino", Precision.INT8)
    options = BuildOptions(engines={"step": own})
    assert options.choice("step") is own
    assert options.choice("planner") == EngineChoice("onnxruntime", Precision.FP32)


def test_progress_counts_up_to_its_total_and_leaves_out_what_was_not_needed() -> None:
    events: list[BuildEvent] = []
    log = ProgressLog(events.append, [("planner", False, False), ("step", True, False), ("vae_decoder", False, False)])
    log.enter("planner", State.CACHED)
    for state in (State.LOADING, State.EXPORTING, State.LOWERING, State.CALIBRATING, State.QUANTIZING, State.VERIFYING):
        log.enter("step", state)
    log.enter("step", State.BUILT)
    for state in (State.LOADING, State.VERIFYING, State.BUILT):  # its graph was there already
        log.enter("vae_decoder", state)
    log.enter("bundle", State.WRITING)
    done = [event.done for event in events]
    assert done == sorted(done)
    assert all(event.done <= event.total for event in events)
    assert events[-1].total - events[-1].done == 1.0, "only the bundle itself is left"
    assert events[0].seconds_left is None
    assert events[-1].seconds_left is not None
    assert str(events[1]) == "step: loading"
