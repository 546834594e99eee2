"""Pictures in: every mode and orientation against what they show, limits, and files that are broken in every way."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mc_runtime.errors import RequestError
from mc_runtime.media import ImageLimits, load_image

WHITE = 255


def rgb_array(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def loaded(source: Any, **options: Any) -> np.ndarray:
    image = load_image(source, **options)
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(height: int, width: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: Pillow writes none of 16 bits a channel in colour, and none with a false header."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def rows_of(values: np.ndarray) -> bytes:
    """Unfiltered PNG rows of big-endian 16-bit values."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
@pytest.mark.parametrize("name", ["picture", "picture.txt", "picture.jpg"])
def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    flat = Image.new("RGB", (9, 7), (250, 20, 30))
    content = encoded(flat, kind, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {}))
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, str(tmp_path / name), content):
        np.testing.assert_allclose(loaded(source).astype(int), np.asarray(flat), atol=3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = Image.fromarray(rgb_array(2, 3)).resize((48, 32), Image.Resampling.NEAREST)
    path = tmp_path / "picture"
    path.write_bytes(encoded(blocks, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(loaded(path), np.asarray(expected))
    assert load_image(path).size == ((48, 32) if orientation < 5 else (32, 48))


@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"MM", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd"])
def test_damaged_exif_turns_nothing(exif: bytes, recwarn: pytest.WarningsRecorder) -> None:
    content = encoded(Image.fromarray(rgb_array()), "JPEG", exif=b"Exif\0\0" + exif)
    expected = np.asarray(Image.open(BytesIO(content)))
    recwarn.clear()
    np.testing.assert_array_equal(loaded(content), expected)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_flattened_on_white(kind: str) -> None:
    colour, alpha = rgb_array(), np.linspace(0, 255, 12 * 20).reshape(12, 20, 1)
    image = Image.fromarray(np.concatenate([colour, alpha.astype(np.uint8)], axis=2), "RGBA")
    share = alpha.astype(np.uint8) / 255
    expected = share * colour + (1 - share) * WHITE
    content = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    np.testing.assert_allclose(loaded(content), expected, atol=1)
    np.testing.assert_allclose(loaded(image), expected, atol=1)
    np.testing.assert_allclose(loaded(image.convert("RGBa")), expected, atol=2)
    grey = image.convert("LA")
    expected = share * np.asarray(grey)[..., :1] + (1 - share) * WHITE
    np.testing.assert_allclose(loaded(grey), expected.repeat(3, axis=2), atol=1)


def test_palettes_with_and_without_transparent_colours() -> None:
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    plain = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(loaded(encoded(image, "PNG")), plain)
    for kind in ("PNG", "GIF"):
        expected = plain.copy()
        expected[np.asarray(image) == 1] = WHITE
        np.testing.assert_array_equal(loaded(encoded(image, kind, transparency=1)), expected)


def test_one_transparent_colour_of_a_picture_without_alpha() -> None:
    array = rgb_array()
    array[2:5, 3:9] = (1, 2, 3)
    expected = array.copy()
    expected[2:5, 3:9] = WHITE
    np.testing.assert_array_equal(loaded(encoded(Image.fromarray(array), "PNG", transparency=(1, 2, 3))), expected)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_black_and_white_and_grey(mode: str) -> None:
    image = Image.fromarray(rgb_array()).convert(mode)
    expected = np.asarray(image.convert("L"))[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(loaded(encoded(image, "PNG")), expected)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 32767, 32768, 65278, 65534, 65535]], np.uint16)
    expected = np.rint(values * (255 / 65535)).astype(np.uint8)[..., None].repeat(3, axis=2)
    content = png(1, values.shape[1], 16, 0, rows_of(values))
    np.testing.assert_array_equal(loaded(content), expected)
    np.testing.assert_array_equal(loaded(Image.fromarray(values)), expected)
    np.testing.assert_array_equal(loaded(Image.fromarray(values.astype(np.int32))), expected)
    np.testing.assert_array_equal(loaded(values), expected)
    transparent = png(1, values.shape[1], 16, 0, rows_of(values), (b"tRNS", struct.pack(">H", 257)))
    expected[0, 6] = WHITE
    np.testing.assert_array_equal(loaded(transparent), expected)


@pytest.mark.parametrize(("channels", "colour"), [(2, 4), (3, 2), (4, 6)])
def test_16_bit_colour_and_alpha_are_scaled(channels: int, colour: int) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    content = png(5, 7, 16, colour, rows_of(values))
    shown = values / 257
    if channels in (2, 4):
        share = values[..., -1:] / 65535
        shown = share * shown[..., :-1] + (1 - share) * WHITE
    np.testing.assert_allclose(loaded(content), shown if channels > 2 else shown.repeat(3, axis=2), atol=2)


def test_cmyk_is_not_inverted() -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :8, 0] = ink[8:, 8:, 3] = 255  # cyan, and black
    image = Image.fromarray(ink, "CMYK")
    for source in (image, encoded(image, "JPEG", quality=100, subsampling=0)):
        found = loaded(source)
        np.testing.assert_allclose(found[2, 2], [0, 255, 255], atol=6)
        np.testing.assert_allclose(found[12, 12], [0, 0, 0], atol=6)
        np.testing.assert_allclose(found[2, 12], [255, 255, 255], atol=6)


def test_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(loaded(content), np.asarray(frames[0]))


def test_arrays() -> None:
    array = rgb_array()
    np.testing.assert_array_equal(loaded(array), array)
    np.testing.assert_array_equal(loaded(array[:, ::-1]), array[:, ::-1])
    for kind in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(loaded((array / 255).astype(kind)), array)
    for grey in (array[..., 0], array[..., :1]):
        np.testing.assert_array_equal(loaded(grey), array[..., :1].repeat(3, axis=2))
    clear = np.concatenate([array, np.zeros((12, 20, 1), np.uint8)], axis=2)
    assert (loaded(clear) == WHITE).all()


def test_what_is_given_stays_as_it_was() -> None:
    array = rgb_array()
    image = Image.fromarray(array)
    load_image(image).putpixel((0, 0), (0, 0, 0))
    np.testing.assert_array_equal(np.asarray(image), array)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"got shape \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \[0, 4, 3\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got shape"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.zeros((4, 4, 3), bool), "got bool"),
        (np.full((4, 4, 3), 200.0), r"lies in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), r"lies in \[0, 1\]"),
        (Image.new("F", (4, 4)), "mode F"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "0 to 65535"),
        (Image.new("RGB", (0, 4)), "empty"),
        (None, "got NoneType"),
        (7, "got int"),
        (b"", "no picture format"),
        (b"%PDF-1.7 and so on", "give PNG, JPEG, WebP or GIF"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "give it as a video"),
    ],
)  # fmt: skip
def test_what_is_no_picture(source: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_cut_anywhere_is_an_error_or_the_whole_picture(tmp_path: Path, kind: str) -> None:
    content = encoded(Image.fromarray(rgb_array(40, 60)), kind)
    whole = loaded(content)
    path = tmp_path / "cut.bin"
    refused = []
    for length in [*range(40), *np.random.default_rng(2).integers(40, len(content), 60), len(content) - 1]:
        path.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(loaded(path), whole)
        except RequestError as error:
            refused.append(str(error))
    assert len(refused) >= 99, "only what lies after the pixels may be missing"
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refused)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_bytes_never_escape_as_another_error(kind: str) -> None:
    content = encoded(Image.fromarray(rgb_array(24, 24)), kind)
    random = np.random.default_rng(3)
    refused = []
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 3):
            damaged[place] = random.integers(0, 256)
        try:
            assert load_image(bytes(damaged)).mode == "RGB"
        except RequestError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in message for message in refused)


def test_limits(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (30, 20)).save(path)
    size = path.stat().st_size
    assert load_image(path, limits=ImageLimits(bytes=size, pixels=600)).size == (30, 20)
    with pytest.raises(RequestError, match=rf"picture\.png: {size} bytes are over the limit of {size - 1}"):
        load_image(path, limits=ImageLimits(bytes=size - 1))
    with pytest.raises(RequestError, match=r"the image: .* bytes are over"):
        load_image(path.read_bytes(), limits=ImageLimits(bytes=size - 1))
    for source in (path, Image.open(path), np.zeros((20, 30, 3), np.uint8)):
        with pytest.raises(RequestError, match=r"30x20 pixels .* over the limit of 599"):
            load_image(source, limits=ImageLimits(pixels=599))
    for bad in ({"bytes": 0}, {"pixels": -1}):
        with pytest.raises(ValueError, match="positive"):
            ImageLimits(**bad)


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_bomb_is_refused_before_it_is_unpacked(side: int, recwarn: pytest.WarningsRecorder) -> None:
    """Some kilobytes that claim 100 million pixels, where Pillow only warns, and 3,600 million, where it stops."""
    content = png(side, side, 8, 2, b"\0" * 1000)
    with pytest.raises(RequestError, match="limit of 67108864"):
        load_image(content)
    assert not recwarn.list


def test_a_picture_of_one_row() -> None:
    assert load_image(encoded(Image.new("RGB", (100_000, 1), (1, 2, 3)), "PNG")).size == (100_000, 1)


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for place, says in [
        ("missing.png", "no such file"), (".", "is a directory"), ("empty.png", "empty"), ("pipe", "no regular file"),
        ("n" * 300, "cannot be read"), ("null\0.png", "check the name"), ("empty.png/x", "check the name"),
    ]:  # fmt: skip
        with pytest.raises(RequestError, match=says) as caught:
            load_image(tmp_path / place)
        assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything
        monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(RequestError, match=r"secret.png: not readable; change its permissions"):
        load_image(path)
