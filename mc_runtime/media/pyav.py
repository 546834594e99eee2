"""MP4 and WebM by PyAV, which is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import RequestError
from mc_runtime.media.clip import Clip
from mc_runtime.media.image_input import broken
from mc_runtime.media.kinds import Kind, video_is_whole
from mc_runtime.media.limits import ClipLimits
from mc_runtime.media.timing import Frame, exact

INSTALL = "pip install 'mc-runtime[video]'"
_DEMUXERS = {Kind.MP4: "mp4", Kind.MATROSKA: "webm"}
# Of bytes, not of machines: with a number of threads of their own, encoders give the same file on two cores and on forty.
_THREADS = "4"


class _Encoder(NamedTuple):
    codec: str
    muxer: str
    options: dict[str, str]
    container: dict[str, str]


# x264's macroblock tree gave different bytes from run to run on pictures of 64 pixels (x264 165, measured); it saves size only.
_H264 = _Encoder("libx264", "mp4", {"crf": "16", "preset": "medium", "x264-params": "mbtree=0"}, {"movflags": "+faststart"})
_MPEG4 = _Encoder("mpeg4", "mp4", {"qscale": "2", "flags": "+qscale"}, {"movflags": "+faststart"})
_VP9 = _Encoder("libvpx-vp9", "webm", {"crf": "20", "b:v": "0", "deadline": "good", "cpu-used": "2"}, {})


def import_av(name: str) -> Any:
    """PyAV, which `name` needs. Raises RequestError where it is not installed, or does not load."""
    try:
        import av
        import av.video.reformatter
    except ImportError as error:
        others = "use GIF, WebP or a folder of frames"
        raise RequestError(f"{name}: MP4 and WebM need PyAV ({error}); {INSTALL}, or {others}") from None
    return av


def decode_video(path: Path, kind: Kind, limits: ClipLimits) -> Iterator[Frame]:
    """Frames in the order they are shown, turned as the file says. Raises RequestError, and what PyAV raises."""
    with _opened(path, kind) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        context = stream.codec_context
        _check_frame(path, context.width, context.height, limits)
        usual = 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)
        until = Fraction(0)
        for frame in container.decode(stream):
            _check_frame(path, frame.width, frame.height, limits)
            if frame.is_corrupt:
                raise broken(str(path), f"frame at {float(until):.2f} s is damaged")
            base = Fraction(frame.time_base or stream.time_base)
            time = until if frame.pts is None else frame.pts * base
            until = time + (frame.duration * base if frame.duration else usual)
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # both count counterclockwise
            yield Frame(np.ascontiguousarray(pixels), time, until)


def video_comment(path: Path, kind: Kind) -> str:
    """The comment inside an MP4 or WebM, or nothing. Raises RequestError."""
    try:
        with _opened(path, kind) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
            return str(tags.get("comment", ""))
    except RequestError:
        raise
    except Exception as error:  # PyAV has one exception an error number of FFmpeg's
        raise broken(str(path), error) from error


def encode_video(clip: Clip, path: Path, suffix: str, comment: str | None) -> None:
    """Writes `clip` to `path` in the format of `suffix`: .mp4 (H.264, else MPEG-4) or .webm (VP9), both yuv420p, BT.709.

    The last row and column are repeated where a side is odd. Raises OSError, and RequestError where PyAV is missing.
    """
    av = import_av(f"*{suffix}")
    encoder = _VP9 if suffix == ".webm" else _H264 if "libx264" in av.codecs_available else _MPEG4
    height, width = (side + side % 2 for side in clip.size)
    rate = exact(clip.fps)
    options = {"fflags": "+bitexact", **encoder.container}  # no random ids, no date
    try:
        with av.open(f"file:{path.absolute()}", "w", format=encoder.muxer, options=options) as container:
            if comment:
                container.metadata["comment"] = comment
            stream = container.add_stream(encoder.codec, rate=rate, options={**encoder.options, "threads": _THREADS})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = stream.codec_context.time_base = 1 / rate
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # 16 to 235
            for index, pixels in enumerate(clip.frames):
                container.mux(stream.encode(_yuv(av, _even(pixels), index, rate)))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, error.strerror) from error


def _yuv(av: Any, pixels: NDArray[np.uint8], index: int, rate: Fraction) -> Any:
    reformatter = av.video.reformatter
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
        format="yuv420p",
        dst_colorspace=reformatter.Colorspace.ITU709,
        dst_color_range=reformatter.ColorRange.MPEG,
    )
    frame.pts, frame.time_base = index, 1 / rate
    return frame


def _even(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _opened(path: Path, kind: Kind) -> Any:
    """The container of a file that is whole. It is read as the format its content showed, by a stream: no demuxer that
    follows addresses to other files or hosts ever sees it."""
    av = import_av(str(path))
    stream = path.open("rb")
    try:
        if not video_is_whole(stream, path.stat().st_size, kind):
            raise broken(str(path), "the file ends early")
        stream.seek(0)
        return _Closing(av.open(stream, format=_DEMUXERS[kind], metadata_errors="replace"), stream)
    except BaseException:
        stream.close()
        raise


class _Closing:
    """A container that closes the stream it reads with itself."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream

    def __enter__(self) -> Any:
        return self._container

    def __exit__(self, *_: object) -> None:
        self._container.close()
        self._stream.close()


def _video_stream(container: Any, path: Path) -> Any:
    """The first stream of moving pictures; a cover is not one."""
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic:
            return stream
    raise RequestError(f"{path}: holds no video; give a file with moving pictures")


def _check_frame(path: Path, width: int, height: int, limits: ClipLimits) -> None:
    if width * height > limits.pixels:
        raise RequestError(f"{path}: frames of {width}x{height} pixels are over the limit of {limits.pixels}; make it smaller")
