"""`mc-runtime build`: report, cache, bad checkpoints, a full disk, an interruption; then `generate` on what it built."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mc_runtime.cli.main import cli

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.factories import tiny_metacanvas_checkpoint

    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("checkpoints") / "checkpoint")


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "damaged"))


def mc_runtime(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), prog_name="mc-runtime")


def assert_refused(result: Result, code: int, *says: str) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for text in says:
        assert text in lines[0]
    assert result.stdout == ""


def test_build_again_and_generate(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    first = mc_runtime("build", checkpoint, "-o", bundle, "--json")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert {engine["component"] for engine in report["engines"]} == {"planner", "step", "vae_decoder"}
    assert not report["unchanged"]

    again = mc_runtime("build", checkpoint, "-o", bundle)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count("from the cache") == 3
    assert "the same to the byte" in again.stdout

    assert mc_runtime("inspect", bundle, "--verify").exit_code == 0
    drawn = mc_runtime("generate", bundle, "a cat", "--steps", 2, "-o", tmp_path / "out.png")
    assert drawn.exit_code == 0, drawn.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out.png"]


def test_another_size_or_target_for_one_component(checkpoint: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    arguments = ["--engine", "vae_decoder=openvino:fp32", "--size", "32x32", "--size", "32x48", "--max-batch", 2]
    result = mc_runtime("build", checkpoint, "-o", bundle, *arguments)
    assert result.exit_code == 0, result.stderr
    manifest = json.loads(mc_runtime("inspect", bundle, "--json").stdout)["manifest"]
    assert manifest["engines"]["vae_decoder"]["target"] == "openvino"
    assert manifest["engines"]["step"]["target"] == "onnxruntime"
    assert manifest["sizes"]["served"] == [[32, 32], [32, 48]]
    assert manifest["max_batch"] == 2
    assert_refused(mc_runtime("generate", bundle, "a cat", "--size", "48x48", "-o", tmp_path / "x.png"), 2, "32x48")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_tensor(file: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    # A planner's language head comes first by name, and is not used.
    name = sorted(key for key in tensors if not key.startswith("lm_head"))[0]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def misshape_tensor(file: Path) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if tensors[key].ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("component", ["transformer", "vae", "planner"])
def test_a_missing_tensor(damaged: Path, tmp_path: Path, component: str) -> None:
    (file,) = (damaged / component).glob("*.safetensors")
    drop_tensor(file)
    assert_refused(mc_runtime("build", damaged, "-o", tmp_path / "bundle"), 3, component, "missing")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("damage", [drop_tensor, misshape_tensor])
def test_a_wrong_canvas_tensor_is_named(damaged: Path, tmp_path: Path, damage: Any) -> None:
    name = damage(damaged / "canvas.safetensors")
    assert_refused(mc_runtime("build", damaged, "-o", tmp_path / "bundle"), 3, "canvas.safetensors", name)


def test_an_unknown_key_in_metacanvas_json(damaged: Path, tmp_path: Path) -> None:
    edit_json(damaged / "metacanvas.json", surprise=1)
    assert_refused(mc_runtime("build", damaged, "-o", tmp_path / "bundle"), 3, "metacanvas.json", "surprise")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert_refused(mc_runtime("build", tmp_path / "nothing", "-o", tmp_path / "bundle"), 3, "nothing")
    assert_refused(mc_runtime("build", tmp_path, "-o", tmp_path / "bundle"), 3, "model_index.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["0x32", "33x32", "32x1000000"])
def test_a_size_the_checkpoint_cannot_do(checkpoint: Path, tmp_path: Path, size: str) -> None:
    assert_refused(mc_runtime("build", checkpoint, "-o", tmp_path / "bundle", "--size", size), 2, size)
    assert list(tmp_path.iterdir()) == []


def test_a_precision_the_target_does_not_have(checkpoint: Path, tmp_path: Path) -> None:
    result = mc_runtime("build", checkpoint, "-o", tmp_path / "bundle", "--precision", "bf16")
    assert_refused(result, 2, "openvino")


def test_an_output_that_holds_something_else(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert_refused(mc_runtime("build", checkpoint, "-o", tmp_path), 2, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert_refused(mc_runtime("build", checkpoint, "-o", tmp_path / "bundle"), 2, "disk is full")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = os.environ | {"MC_RUNTIME_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "mc_runtime.cli.main", "build", str(checkpoint), "-o", str(tmp_path / "bundle")]
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None and not list(tmp_path.glob(".bundle.*")):
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)  # Ctrl-C takes the same way
        _, stderr = child.communicate(timeout=120)
    assert child.returncode == 130, stderr
    assert stderr == "Error: interrupted; nothing was left half-written\n"
    assert [path.name for path in tmp_path.iterdir() if path != cache] == []
    assert not list(cache.rglob("*.staged-*"))
