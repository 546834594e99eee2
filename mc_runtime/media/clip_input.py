"""Clips in: a video, an animation, a folder of frames, images or an array become frames at a steady rate."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mc_runtime.errors import RequestError
from mc_runtime.media.clip import Clip
from mc_runtime.media.clip_folder import numbered_frames
from mc_runtime.media.files import check_readable, read_bytes
from mc_runtime.media.fit import FitMode, resized
from mc_runtime.media.image_input import ImageSource, broken, bytes_from_array, load_image, open_image, rgb
from mc_runtime.media.kinds import kind_of_file
from mc_runtime.media.limits import ClipLimits, ImageLimits
from mc_runtime.media.timing import Frame, exact, resampled, steady

ClipSource = str | os.PathLike[str] | Clip | Sequence[ImageSource] | NDArray[Any]
FASTEST = 1000
"""Frames a second that can be asked for."""
_PAUSE = Fraction(1, 10)
"""How long browsers show a frame of an animation that names no time, or in GIF one below 20 ms."""


def load_clip(
    source: ClipSource,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    size: tuple[int, int] | None = None,
    mode: FitMode = "stretch",
    source_fps: float | None = None,
    limits: ClipLimits | None = None,
) -> Clip:
    """A clip's frames, resampled to `fps`: each the input frame whose timestamp is nearest (`timing.resampled`).

    Args:
        source: a file's path (MP4, MOV, WebM, MKV, GIF, animated WebP or PNG, told apart by content), a folder of numbered
            pictures, a sequence of what `load_image` takes, an array `[F, h, w, 3]` (uint8, uint16 or float in [0, 1]), or
            a clip.
        fps: frames a second to give; those of the source by default.
        max_frames: the clip ends there; what comes after is not read.
        size: (height, width) every frame is resized to as soon as it is read, so that a large video takes little memory.
        mode: how, as `fit` does it.
        source_fps: rate of a source that has no times (a folder, a sequence, an array); `fps` by default.
        limits: of bytes, frames, seconds and pixels.

    Rotation that a file asks for is applied; sound is passed over; transparency is flattened on white.

    Raises:
        RequestError: the file cannot be read, is broken, cut or empty, is of another format, or passes a limit; or PyAV,
            which MP4 and WebM need, is not installed. One line that names the file.
    """
    limits = limits or ClipLimits()
    for rate in (fps, source_fps):
        if rate is not None and not (math.isfinite(rate) and 0 < rate <= FASTEST):
            raise RequestError(f"fps is above 0 and at most {FASTEST}, got {rate}")
    if max_frames is not None and max_frames < 1:
        raise RequestError(f"max_frames is at least 1, got {max_frames}")
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the clip"
    try:
        with closing(_counted(_frames(source, source_fps or fps, limits), name, limits)) as frames:
            watched = _Watch(frames)
            pixels = resampled(watched, exact(fps)) if fps else (frame.pixels for frame in watched)
            kept = _kept(islice(pixels, max_frames), name, size, mode, limits)
            return Clip(kept, fps or watched.rate)
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them into
        raise broken(name, error) from error


class _Watch:
    """Passes frames on and remembers how fast they came."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self._count, self._start, self._end = 0, Fraction(0), Fraction(1)

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._frames:
            self._start = frame.time if not self._count else self._start
            self._count, self._end = self._count + 1, frame.until
            yield frame

    @property
    def rate(self) -> float:
        """Frames a second on average, to a thousandth, as containers round their times."""
        length = self._end - self._start
        return max(0.001, round(float(self._count / length), 3)) if length > 0 else 1.0


def _frames(source: ClipSource, rate: float | None, limits: ClipLimits) -> Iterator[Frame]:
    """The source's frames with their times; those without are steady at `rate`."""
    if isinstance(source, Clip):
        return steady(source.frames, exact(source.fps))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_dir():
            return _file_frames(path, limits)
        pictures: Sequence[ImageSource] = numbered_frames(path)
    elif isinstance(source, np.ndarray):
        if source.ndim != 4 or source.shape[3] != 3 or not source.size:
            raise RequestError(f"a clip array is [F, h, w, 3], got shape {list(source.shape)}")
        return steady((bytes_from_array(frame) for frame in source), _needed(rate))
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        pictures = source
    else:
        raise RequestError(f"a clip is a path, a sequence of images or an array, got {type(source).__name__}")
    image_limits = ImageLimits(pixels=limits.pixels)
    return steady((np.asarray(load_image(each, limits=image_limits)) for each in pictures), _needed(rate))


def _needed(rate: float | None) -> Fraction:
    if rate is None:
        raise RequestError("frames of a folder, a sequence or an array have no times; say fps")
    return exact(rate)


def _file_frames(path: Path, limits: ClipLimits) -> Iterator[Frame]:
    check_readable(path, limits.bytes)
    kind = kind_of_file(path)
    if kind is None:
        raise RequestError(f"{path}: no video format that is read; give MP4, WebM, GIF or WebP, or a folder of frames")
    if kind.needs_pyav:
        from mc_runtime.media.pyav import decode_video

        return decode_video(path, kind, limits)
    return _animation_frames(path, limits)


def _animation_frames(path: Path, limits: ClipLimits) -> Iterator[Frame]:
    """GIF, WebP and PNG by Pillow; a picture that does not move is one frame."""
    with open_image(read_bytes(path, limits.bytes), str(path), limits.pixels) as image:
        time = Fraction(0)
        shortest = 20 if image.format == "GIF" else 1
        for index in range(getattr(image, "n_frames", 1) if image.format != "GIF" else limits.frames + 1):
            try:
                image.seek(index)
            except EOFError:  # a GIF's frames are not counted in advance, which would unpack every one
                return
            pixels = np.asarray(rgb(image))
            milliseconds = image.info.get("duration") or 0
            length = Fraction(milliseconds).limit_denominator(1000) / 1000 if milliseconds >= shortest else _PAUSE
            yield Frame(pixels, time, time + length)
            time += length


def _counted(frames: Iterator[Frame], name: str, limits: ClipLimits) -> Generator[Frame]:
    """The frames, within the limits of frames and seconds; at least one. Closing it closes `frames`."""
    start: Fraction | None = None
    try:
        for count, frame in enumerate(frames, start=1):
            start = frame.time if start is None else start
            if count > limits.frames:
                raise RequestError(f"{name}: more than the limit of {limits.frames} frames; cut it, or ask for fewer")
            if frame.time - start > limits.seconds:
                raise RequestError(f"{name}: longer than the limit of {limits.seconds} seconds; cut it, or ask for fewer")
            yield frame
    finally:
        if hasattr(frames, "close"):
            frames.close()
    if start is None:
        raise RequestError(f"{name}: holds no frames; give another")


def _kept(
    pixels: Iterator[NDArray[np.uint8]], name: str, size: tuple[int, int] | None, mode: FitMode, limits: ClipLimits
) -> NDArray[np.uint8]:
    """All frames as one array, each resized as it comes. Raises RequestError where they differ in size, or are too many."""
    kept: list[NDArray[np.uint8]] = []
    last: NDArray[np.uint8] | None = None
    total = 0
    for frame in pixels:
        if frame is last:
            small = kept[-1]
        else:
            small = frame if size is None else np.asarray(resized(Image.fromarray(frame), size, mode))
            last = frame
        if kept and small.shape != kept[0].shape:
            (h, w, _), (height, width, _) = small.shape, kept[0].shape
            raise RequestError(f"{name}: frame {len(kept)} has {w}x{h} pixels and the first {width}x{height}; make them equal")
        total += small.shape[0] * small.shape[1]
        if total > limits.kept_pixels:
            full = f"{len(kept)} frames fill the limit of {limits.kept_pixels} pixels"
            raise RequestError(f"{name}: {full}; ask for fewer or smaller ones")
        kept.append(small)
    return np.stack(kept)
