"""Clips in and out: what is written is read, at any rate, turned, from files, folders and arrays."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media import Clip, load_clip, read_metadata
from mc_runtime.media.timing import Frame, exact, resampled
from tests.runtime.moving_clips import METADATA, moving, numbers, written

SUFFIXES = [".mp4", ".webm", ".gif", ".webp", ""]
TOLERANCE = {".mp4": 6.0, ".webm": 6.0, ".webp": 6.0, ".gif": 0.0, "": 0.0}


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


def test_a_gif_of_many_colours_stays_near_and_one_of_few_is_exact(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64)
    frames = np.stack([np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 40.0 * i), axis=2) for i in range(4)])
    found = load_clip(written(tmp_path, ".gif", Clip(frames.astype(np.uint8), 10)))
    assert np.abs(found.frames.astype(int) - frames).mean() < 8
