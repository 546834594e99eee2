"""Clips in and out: what is written is read, at any rate, turned, limited, and broken in every way."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mc_runtime.errors import OutputError, RequestError
from mc_runtime.media import Clip, ClipLimits, load_clip, read_metadata, save_clip
from mc_runtime.media.timing import Frame, exact, resampled

METADATA = {"prompt": 'a "red" circle, 猫', "seed": 7, "size": [32, 48]}
SUFFIXES = [".mp4", ".webm", ".gif", ".webp", ""]
TOLERANCE = {".mp4": 6.0, ".webm": 6.0, ".webp": 6.0, ".gif": 0.0, "": 0.0}


def moving(count: int = 9, height: int = 32, width: int = 48, fps: float = 24) -> Clip:
    """Frame i is a grey of its own with a red left part: `level` reads i back through any codec."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (20 + 12 * np.arange(count) % 230)[:, None, None, None]
    frames[:, :, : width // 4] = (200, 20, 20)
    return Clip(frames, fps)


def numbers(clip: Clip) -> list[int]:
    """Which frame of `moving` each one is."""
    return [round((float(frame[:, -10:].mean()) - 20) / 12) for frame in clip.frames]


def written(folder: Path, suffix: str, clip: Clip | None = None, **options: Any) -> Path:
    path = folder / f"clip{suffix}"
    save_clip(clip or moving(), path, **options)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_with_how_it_was_made(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, metadata=METADATA)
    clip = load_clip(path, source_fps=24)
    assert clip.fps == pytest.approx(24, abs=0.7)  # WebM rounds times to 1 ms, GIF to 10
    assert clip.frames.shape == (9, 32, 48, 3)
    difference = np.abs(clip.frames.astype(int) - moving().frames)
    assert difference.mean() <= TOLERANCE[suffix], f"max {difference.max()}, mean {difference.mean()}"
    assert numbers(load_clip(path, fps=24)) == list(range(9))
    assert read_metadata(path) == METADATA
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_clips_are_equal_bytes_and_metadata_is_optional(tmp_path: Path, suffix: str) -> None:
    def content(path: Path) -> list[bytes]:
        return [each.read_bytes() for each in (sorted(path.iterdir()) if path.is_dir() else [path])]

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, suffix)
    assert content(tmp_path / "one" / f"clip{suffix}") == content(tmp_path / "two" / f"clip{suffix}")
    assert read_metadata(tmp_path / "one" / f"clip{suffix}") == {}


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sides_are_padded_by_their_edge(tmp_path: Path, suffix: str) -> None:
    clip = moving(3, 33, 47)
    found = load_clip(written(tmp_path, suffix, clip))
    assert found.size == (34, 48)
    expected = np.pad(clip.frames, ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    assert np.abs(found.frames.astype(int) - expected).mean() < 6


def expected_numbers(times: list[Fraction], end: Fraction, rate: Fraction) -> list[int]:
    """The documented rule, said again: nearest timestamp, of two the earlier; no last quarter of a frame."""
    last = end - min(end - times[-1], 1 / rate) / 4
    moments = [index / rate for index in range(10_000) if index == 0 or index / rate < last]
    return [min(range(len(times)), key=lambda k: (abs(times[k] - moment), k)) for moment in moments]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize(("source", "target"), [(24, 16), (30, 24), (12, 25), (10, 3), (23.976, 24)])
def test_rates(tmp_path: Path, suffix: str, source: float, target: float) -> None:
    clip = moving(11, fps=source)
    unit = {".mp4": None, ".gif": 100, ".webp": 1000}[suffix]
    times = [i / exact(source) if unit is None else Fraction(round(i * unit / source), unit) for i in range(12)]
    found = load_clip(written(tmp_path, suffix, clip), fps=target)
    assert found.fps == target
    assert numbers(found) == expected_numbers(times[:-1], times[-1], exact(target))


@pytest.mark.parametrize("seed", range(20))
def test_any_times(seed: int) -> None:
    random = np.random.default_rng(seed)
    steps = [Fraction(int(step), 1000) for step in random.integers(1, 120, random.integers(2, 40))]
    times = [sum(steps[:i], Fraction(3)) for i in range(len(steps) + 1)]
    frames = (Frame(np.full((1, 1, 3), i, np.uint8), times[i], times[i + 1]) for i in range(len(steps)))
    rate = exact(float(random.choice([1, 7, 16, 23.976, 60])))
    found = [int(pixels[0, 0, 0]) for pixels in resampled(frames, rate)]
    assert found == expected_numbers([time - 3 for time in times[:-1]], times[-1] - 3, rate)


@pytest.mark.parametrize(
    ("rate", "fraction"),
    [(24, 24), (23.976, Fraction(24000, 1001)), (29.97, Fraction(30000, 1001)), (0.1, Fraction(1, 10))],
)
def test_rates_are_exact(rate: float, fraction: Fraction) -> None:
    assert exact(rate) == fraction


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_clip_ends_where_it_is_told_to_and_takes_the_size(tmp_path: Path, suffix: str) -> None:
    clip = load_clip(written(tmp_path, suffix), fps=24, max_frames=4, size=(16, 20))
    assert clip.frames.shape == (4, 16, 20, 3)
    assert numbers(clip) == [0, 1, 2, 3]


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_rotation_is_applied(tmp_path: Path, angle: int) -> None:
    av = pytest.importorskip("av")
    frame = moving(1).frames[0].copy()
    frame[: len(frame) // 2, -8:] = (20, 20, 220)  # blue in one corner: no two turns look the same
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(angle)
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = load_clip(path).frames[0]
    expected = np.rot90(frame, angle // 90)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {suffix: written(folder, suffix) for suffix in SUFFIXES if suffix}


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


def test_a_folder_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number, frame in enumerate(moving(11).images):
        frame.save(tmp_path / f"frame-{number + 95}.png")
    (tmp_path / "notes.txt").write_text("x")
    clip = load_clip(tmp_path, fps=12)
    assert numbers(clip) == list(range(11))
    assert numbers(load_clip(tmp_path, fps=12, source_fps=24)) == [0, 2, 4, 6, 8, 10]
    (tmp_path / "frame-0095.png").write_bytes((tmp_path / "frame-95.png").read_bytes())
    with pytest.raises(RequestError, match="are both frame 95"):
        load_clip(tmp_path, fps=12)


def test_arrays_and_sequences() -> None:
    clip = moving(4)
    for source in (clip, clip.frames, clip.images, list(clip.frames), clip.pixels[0]):
        np.testing.assert_array_equal(load_clip(source, fps=24).frames, clip.frames)
    for source, says in [
        ([], "holds no frames"), (np.zeros((2, 3, 3)), "got shape"), (7, "got int"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 5))], "4x5 pixels and the first 4x4"), (["missing.png"], "no such"),
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=says):
            load_clip(source, fps=24)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="say fps"):
        load_clip(clip.frames)
    for options in ({"fps": 0}, {"fps": float("nan")}, {"fps": 24, "max_frames": 0}):
        with pytest.raises(RequestError):
            load_clip(clip, **options)


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


def test_mp4_without_x264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    path = written(tmp_path, ".mp4", metadata=METADATA)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    found = load_clip(path)
    assert np.abs(found.frames.astype(int) - moving().frames).mean() < 6
    assert read_metadata(path) == METADATA


def test_a_clip_in_which_nothing_moves_keeps_its_length(tmp_path: Path) -> None:
    still = Clip(moving(1).frames.repeat(12, axis=0), 24)
    for suffix in (".mp4", ".webm", ".gif"):
        assert len(load_clip(written(tmp_path, suffix, still), fps=24)) == 12


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


def test_a_gif_of_many_colours_stays_near_and_one_of_few_is_exact(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64)
    frames = np.stack([np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 40.0 * i), axis=2) for i in range(4)])
    found = load_clip(written(tmp_path, ".gif", Clip(frames.astype(np.uint8), 10)))
    assert np.abs(found.frames.astype(int) - frames).mean() < 8


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
