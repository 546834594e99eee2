"""Clips that are broken, too large or none, and places that cannot be written: one clear error each, nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.errors import OutputError, RequestError
from mc_runtime.media import Clip, ClipLimits, load_clip, read_metadata
from tests.runtime.moving_clips import moving, written

SUFFIXES = [".mp4", ".webm", ".gif", ".webp"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {suffix: written(folder, suffix) for suffix in SUFFIXES}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_a_file_cut_anywhere_is_one_clear_error(files: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    content = files[suffix].read_bytes()
    path = tmp_path / "cut"
    for length in sorted({0, 1, 8, 13, 40, len(content) - 1, *np.random.default_rng(0).integers(0, len(content), 20).tolist()}):
        path.write_bytes(content[:length])
        with pytest.raises(RequestError) as caught:
            load_clip(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_damaged_bytes_never_escape_as_another_error(files: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    content = files[suffix].read_bytes()
    random = np.random.default_rng(1)
    path = tmp_path / "damaged"
    limits = ClipLimits(frames=100, kept_pixels=2**20, pixels=2**18)
    outcomes = []
    for _ in range(40):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 4):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            outcomes.append(str(load_clip(path, limits=limits).size))
        except RequestError as error:
            outcomes.append(str(error))
    assert not any("\n" in outcome for outcome in outcomes)
    assert any("broken" in outcome for outcome in outcomes)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"frames": 8}, "limit of 8 frames"),
        ({"seconds": 0.2}, r"limit of 0\.2 seconds"),
        ({"pixels": 32 * 48 - 1}, "48x32 pixels are over the limit of 1535"),
        ({"kept_pixels": 8 * 32 * 48}, "8 frames fill the limit"),
        ({"bytes": 100}, "bytes are over the limit of 100"),
    ],
)
def test_limits(files: dict[str, Path], suffix: str, limits: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        load_clip(files[suffix], limits=ClipLimits(**limits))


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    image = b"\x2c" + bytes(4) + b"\xff\xff\xff\xff\0\x02\x02\x4c\x01\0"
    path = tmp_path / "bomb.gif"
    path.write_bytes(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + image * 1000 + b";")
    with pytest.raises(RequestError, match="limit"):
        load_clip(path)


def test_a_video_without_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "empty.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
    with pytest.raises(RequestError, match=r"empty\.mp4"):
        load_clip(path)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(RequestError, match=r"song\.mp4: holds no video"):
        load_clip(path)


def test_places_that_hold_no_clip(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all " * 10)
    for place, says in [("missing.mp4", "no such file"), ("text.mp4", "no video format"), (".", "no numbered frames")]:
        with pytest.raises(RequestError, match=says):
            load_clip(tmp_path / place, fps=8)


@pytest.mark.parametrize("suffix", [".avi", ".png", ".mp4x"])
def test_unknown_suffixes_name_the_known_ones(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match=r"\.mp4, \.webm, \.gif, \.webp"):
        written(tmp_path, suffix)


def test_what_formats_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="at most 50 frames a second"):
        written(tmp_path, ".gif", moving(fps=60))
    with pytest.raises(OutputError, match="20000x1 pixels cannot be webp"):
        written(tmp_path, ".webp", Clip(np.zeros((2, 1, 20_000, 3), np.uint8), 8))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "")
    written(tmp_path, "", moving(3))
    assert len(list(path.iterdir())) == 3
    (path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files \(notes\.txt\)"):
        written(tmp_path, "")
    assert len(list(path.iterdir())) == 4


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_a_write_that_fails_leaves_the_old_clip(tmp_path: Path, suffix: str) -> None:
    """The system itself refuses to make files of more than a kilobyte."""
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"before")
    code = (
        "import numpy as np, resource, sys\nfrom mc_runtime.errors import OutputError\n"
        "from mc_runtime.media import Clip, save_clip\n"
        "clip = Clip(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8), 8)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1024, {resource.RLIM_INFINITY}))\n"
        "try:\n    save_clip(clip, sys.argv[1])\nexcept OutputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "cannot be written (File too large)" in done.stdout
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_runtime.media import pyav

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pyav, "_yuv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, ".mp4")
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_the_error_says_what_to_install(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for act in (lambda: load_clip(files[".mp4"]), lambda: read_metadata(files[".webm"]), lambda: written(tmp_path, ".mp4")):
        with pytest.raises(RequestError, match=r"pip install 'mc-runtime\[video\]'"):
            act()
    assert list(tmp_path.iterdir()) == []
    assert len(load_clip(files[".gif"])) == 9
