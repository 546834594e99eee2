"""`mc-runtime generate` on a fake bundle: files, JSON, and every bad input in one line with nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mc_runtime import __version__
from mc_runtime.bundle.machine import machine_for
from mc_runtime.bundle.store import open_bundle, sha256_of
from mc_runtime.cli.generate import _input_of
from mc_runtime.cli.main import cli
from mc_runtime.media import Clip, read_metadata
from tests.runtime.fake_bundle import write_fake_bundle

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle nobody damages."""
    return write_fake_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return write_fake_bundle(tmp_path / "bundle")


def generate(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["generate", *map(str, arguments)], prog_name="mc-runtime")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_writes_the_picture_and_says_where(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = generate(bundle, PROMPT, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert pixels(out).shape == (32, 32, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_clips_name_on_a_bundle_of_pictures_names_what_it_can_do(bundle: Path, tmp_path: Path) -> None:
    result = generate(bundle, PROMPT, "-o", tmp_path / "boat.mp4")
    assert result.exit_code == 2
    assert "this bundle makes pictures (text-to-image); end the name in one of .png" in result.stderr
    result = generate(bundle, PROMPT, "-o", tmp_path / "boat.mp4", "--image", tmp_path / "day.jpg")
    assert "it can do text-to-image (needs a prompt alone)" in result.stderr


def test_the_same_seed_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert generate(bundle, PROMPT, "--seed", 3, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_every_option_reaches_the_picture(bundle: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.png"
    generate(bundle, PROMPT, "-o", plain)
    for number, options in enumerate(
        [["--seed", 1], ["--steps", 2], ["--guidance", 7], ["--negative-prompt", "blue square"], ["--size", "32x64"]]
    ):
        other = tmp_path / f"{number}.png"
        assert generate(bundle, PROMPT, "-o", other, *options).exit_code == 0
        assert not np.array_equal(pixels(plain), pixels(other)), options


def test_size_is_height_by_width(bundle: Path, tmp_path: Path) -> None:
    generate(bundle, PROMPT, "--size", "32x64", "-o", tmp_path / "wide.png")
    assert pixels(tmp_path / "wide.png").shape == (32, 64, 3)


def test_many_pictures_are_numbered_and_equal_those_made_alone(bundle: Path, tmp_path: Path) -> None:
    result = generate(bundle, PROMPT, "-n", 3, "--seed", 5, "-o", tmp_path / "out.png", "--sheet", tmp_path / "sheet.png")
    assert result.exit_code == 0, result.stderr
    names = ["out-0.png", "out-1.png", "out-2.png", "sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    generate(bundle, PROMPT, "--seed", 7, "-o", tmp_path / "alone.png")
    assert np.array_equal(pixels(tmp_path / "out-2.png"), pixels(tmp_path / "alone.png"))
    assert pixels(tmp_path / "sheet.png").size > 3 * pixels(tmp_path / "alone.png").size


def test_canvas_map(bundle: Path, tmp_path: Path) -> None:
    result = generate(bundle, PROMPT, "-o", tmp_path / "out.png", "--canvas-map", tmp_path / "map.png")
    assert result.exit_code == 0, result.stderr
    assert pixels(tmp_path / "map.png").ndim == 3


def test_json_is_one_document(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jpg"
    result = generate(bundle, PROMPT, "-o", out, "--steps", 2, "--seed", 9, "--size", "64x32", "--json")
    document = json.loads(result.stdout)
    assert document["images"] == [{"path": str(out), "seed": 9}]
    assert document["size"] == [64, 32]
    assert document["prompt"] == PROMPT
    assert document["timings"]["total"] > 0
    assert result.stderr == ""


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_file_says_how_it_was_made_unless_told_not_to(bundle: Path, tmp_path: Path, suffix: str) -> None:
    out, bare, sheet = (tmp_path / f"{name}{suffix}" for name in ("out", "bare", "sheet"))
    options = ["--steps", 2, "--guidance", 3.5, "--negative-prompt", "blue square"]
    assert generate(bundle, PROMPT, "--seed", 9, "-o", out, *options, "--sheet", sheet).exit_code == 0
    said = read_metadata(out)
    versions = said.pop("versions")
    assert versions["mc_runtime"] == __version__
    assert set(versions) > {"mc_runtime"}
    assert said.pop("checkpoint") == open_bundle(bundle).manifest.checkpoint.sha256
    assert said.pop("bundle") == open_bundle(bundle).manifest.name
    assert said == {
        "task": "text-to-image", "prompt": PROMPT, "negative_prompt": "blue square",
            "steps": 2, "guidance": 3.5, "size": [32, 32], "seed": 9,
        "bundle_sha256": sha256_of(bundle / "manifest.json"),
    }  # fmt: skip
    assert read_metadata(sheet)["prompt"] == PROMPT
    result = generate(bundle, PROMPT, "--seed", 9, "-o", bare, *options, "--sheet", sheet, "--no-metadata", "--json")
    assert json.loads(result.stdout)["prompt"] == PROMPT
    np.testing.assert_array_equal(pixels(bare), pixels(out))
    for path in (bare, sheet):
        assert read_metadata(path) == {}
        assert PROMPT.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "steps must be a whole number from 1 to 10"),
        (["--steps", "11"], "from 1 to 10"),
        (["--steps", "-3"], "from 1 to 10"),
        (["--size", "0x0"], "the nearest is 16x16"),
        (["--size=-32x32"], "the nearest is 16x32"),
        (["--size", "33x32"], "the nearest is 32x32 or 40x32"),
        (["--size", "999999x32"], "the nearest is 128x32"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "-1"], "guidance"),
        (["--seed", "-1"], "seed"),
        (["-n", "0"], "num_images"),
        (["-n", "1000000000"], "num_images"),
    ],
)
def test_a_request_that_cannot_be_served(bundle: Path, tmp_path: Path, options: list[str], says: str) -> None:
    result = generate(bundle, PROMPT, "-o", tmp_path / "out.png", *options)
    assert_refused(result, 2, says)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_over_the_limit(bundle: Path, tmp_path: Path) -> None:
    assert_refused(generate(bundle, "a red circle " * 9, "-o", tmp_path / "out.png"), 2, "8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("out.bmp2", "end the name in"),
        ("out", "end the name in"),
        ("missing/out.png", "make it first"),
        ("file/out.png", "make it first"),
        ("folder.png", "is a directory"),
        ("n" * 300 + ".png", "too long"),
    ],
)
def test_an_output_that_cannot_be_written(bundle: Path, tmp_path: Path, output: str, says: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert_refused(generate(bundle, PROMPT, "-o", tmp_path / output), 2, says)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_of_the_same_name(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert_refused(generate(bundle, PROMPT, "-o", out, "--canvas-map", out), 2, "same name")


def test_a_full_disk_leaves_no_picture(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert_refused(generate(bundle, PROMPT, "-o", tmp_path / "out.png"), 2, "No space left")
    assert list(tmp_path.iterdir()) == []


def test_no_such_bundle(tmp_path: Path) -> None:
    assert_refused(generate(tmp_path / "nothing", PROMPT, "-o", tmp_path / "out.png"), 3, "mc-runtime build")


def test_a_missing_engine(fresh: Path, tmp_path: Path) -> None:
    (fresh / "step" / "model.onnx").unlink()
    assert_refused(generate(fresh, PROMPT, "-o", tmp_path / "out.png"), 3, "step/model.onnx: missing")


def test_a_truncated_engine(fresh: Path, tmp_path: Path) -> None:
    path = fresh / "step" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-7])
    assert_refused(generate(fresh, PROMPT, "-o", tmp_path / "out.png"), 3, "bytes where the manifest says")


def test_an_altered_engine(fresh: Path, tmp_path: Path) -> None:
    path = fresh / "vae_decoder" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert_refused(generate(fresh, PROMPT, "-o", tmp_path / "out.png"), 3, "altered")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "something"}, "not an mc-runtime bundle"),
        ({"surprise": 1}, "surprise: unknown key"),
    ],
)
def test_another_manifest(fresh: Path, tmp_path: Path, edit: dict[str, object], says: str) -> None:
    path = fresh / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert_refused(generate(fresh, PROMPT, "-o", tmp_path / "out.png"), 3, says)


def test_a_manifest_that_is_no_json(fresh: Path, tmp_path: Path) -> None:
    (fresh / "manifest.json").write_text("{")
    assert_refused(generate(fresh, PROMPT, "-o", tmp_path / "out.png"), 3, "manifest.json")


@pytest.mark.parametrize("change", [{"arch": "riscv"}, {"os": "plan9"}, {"features": ("no_such|feature",)}])
def test_a_bundle_for_another_machine(tmp_path: Path, change: dict[str, Any]) -> None:
    other = write_fake_bundle(tmp_path / "bundle", machine=replace(machine_for([]), **change))
    assert_refused(generate(other, PROMPT, "-o", tmp_path / "out.png"), 3, "on this machine")


def test_nan_in_the_latents_names_the_step(tmp_path: Path) -> None:
    broken = write_fake_bundle(tmp_path / "bundle", nan_below=600)
    result = generate(broken, PROMPT, "-o", tmp_path / "out.png", "--steps", 4)
    assert_refused(result, 4, "step 3 of 4")
    assert not (tmp_path / "out.png").exists()


def test_a_stock_bundle_has_no_canvas_map(tmp_path: Path) -> None:
    stock = write_fake_bundle(tmp_path / "bundle", stock=True)
    result = generate(stock, PROMPT, "-o", tmp_path / "out.png", "--canvas-map", tmp_path / "map.png")
    assert_refused(result, 2, "--canvas-map")
    assert generate(stock, PROMPT, "-o", tmp_path / "out.png").exit_code == 0


def test_no_heavy_library_is_imported(bundle: Path, tmp_path: Path) -> None:
    heavy = ("torch", "diffusers", "transformers", "mc_export", "openvino", "rich", "onnx", "pydantic")
    code = (
        "import sys\nfrom mc_runtime.cli.main import cli\n"
        f"try:\n    cli.main(['generate', {str(bundle)!r}, 'a circle', '-o', {str(tmp_path / 'out.png')!r}])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def assert_refused(result: Result, code: int, says: str) -> None:
    """The exit code, and one line that says it; nothing on standard output."""
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert says in lines[0]
    assert result.stdout == ""


def test_a_comparison_shows_an_animated_file_as_what_it_was_given_as(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (80 * index, 0, 0)) for index in range(3)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    clip = _input_of({"video": path})
    assert isinstance(clip, Clip)
    assert [int(frame[0, 0, 0]) for frame in clip.frames] == [0, 80, 160]
    picture = _input_of({"image": [path, path], "video": path})
    assert isinstance(picture, Image.Image)
    assert picture.getpixel((0, 0)) == (0, 0, 0)
