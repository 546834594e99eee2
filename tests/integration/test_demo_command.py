"""The names of the demos: built at first use in a process of its own, found again, built anew when the checkpoint changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mc_runtime.cli import demo

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.factories import tiny_metacanvas_checkpoint

    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint")


def mc_runtime(
    checkpoint: Path, *arguments: object, cache: Path | None = None, name: str = "demo"
) -> subprocess.CompletedProcess[str]:
    """The command with `checkpoint` in the place of the one shipped as `name`, in a process that cannot import torch."""
    code = (
        "import sys; sys.modules.update(torch=None, diffusers=None, transformers=None)\n"
        "from pathlib import Path\nfrom mc_runtime.cli import demo, main\n"
        "if __name__ == '__main__':\n"
        f"    demo.CHECKPOINTS[{name!r}] = Path({str(checkpoint)!r})\n"
        f"    main.cli.main({[str(each) for each in arguments]!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {} if cache is None else {"MC_RUNTIME_CACHE": str(cache)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_first_use_builds_and_the_second_finds(checkpoint: Path, own_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    first = mc_runtime(checkpoint, "generate", "demo", "a cat", "--steps", 2, "-o", out)
    assert first.returncode == 0, first.stderr
    (bundle,) = (own_cache / "demo").glob("*/manifest.json")
    built = bundle.stat().st_mtime_ns
    drawn = out.read_bytes()

    second = mc_runtime(checkpoint, "generate", "demo", "a cat", "--steps", 2, "-o", out)
    assert second.returncode == 0, second.stderr
    assert bundle.stat().st_mtime_ns == built
    assert out.read_bytes() == drawn


def test_another_checkpoint_is_another_bundle(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    before = demo._fingerprint(tmp_path)
    assert demo._fingerprint(tmp_path) == before
    (tmp_path / "a.json").write_text("{ }")
    assert demo._fingerprint(tmp_path) != before


def test_what_fails_in_the_building_process_fails_here(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    done = mc_runtime(tmp_path, "inspect", "demo", cache=tmp_path / "cache")
    assert done.returncode == 3
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "cache" / "demo").glob("[!.]*")) == []


def test_a_cache_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = mc_runtime(checkpoint, "inspect", "demo", cache=tmp_path / "file")
    assert done.returncode == 2
    assert "MC_RUNTIME_CACHE" in done.stderr
