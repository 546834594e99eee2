"""Pixels, files, sheets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mc_runtime.errors import EngineError, OutputError, RequestError
from mc_runtime.media import contact_sheet, pixels_to_images, read_metadata, save_image
from mc_runtime.media.files import check_writable
from mc_runtime.media.metadata import LONGEST_TEXT

METADATA = {"prompt": 'a "red" circle, 猫', "seed": 7, "size": [4, 6], "guidance": 4.5, "negative_prompt": ""}


def picture(height: int = 48, width: int = 64) -> Image.Image:
    """Smooth, so that lossy formats stay near it."""
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def test_pixels_become_the_nearest_bytes() -> None:
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    pixels = np.broadcast_to(levels[None, :, None, None], (2, 256, 5, 3)).copy()
    first, second = pixels_to_images(pixels)
    assert first.mode == "RGB"
    assert first.size == (5, 256)
    np.testing.assert_array_equal(np.asarray(first)[:, 0, 0], np.arange(256))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    shifted = pixels_to_images(pixels[:1] + np.float32(0.4 / 255))[0]
    np.testing.assert_array_equal(np.asarray(shifted)[:, 0, 0], np.arange(256))


def test_pixels_outside_are_clamped_and_lost_ones_are_an_engine_error() -> None:
    assert np.asarray(pixels_to_images(np.array([[[[-0.5, 0.5, 1.5]]]], np.float32))[0]).tolist() == [[[0, 128, 255]]]
    with pytest.raises(EngineError, match="not finite"):
        pixels_to_images(np.full((1, 1, 1, 3), np.nan, np.float32))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_a_file_holds_the_picture_and_how_it_was_made(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    save_image(picture(), path, METADATA)
    with Image.open(path) as loaded:
        difference = np.abs(np.asarray(loaded.convert("RGB"), np.int16) - np.asarray(picture(), np.int16))
    assert difference.max() <= (0 if suffix.lower() == ".png" else 12)
    assert read_metadata(path) == METADATA
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_equal_pictures_are_equal_bytes(tmp_path: Path, suffix: str) -> None:
    for name, metadata in (("one", METADATA), ("two", dict(reversed(METADATA.items())))):
        save_image(picture(), tmp_path / f"{name}{suffix}", metadata)
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_metadata_is_optional_and_bounded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    save_image(picture(), path)
    assert read_metadata(path) == {}
    save_image(picture(), path, {"prompt": "猫" * 100_000})
    assert read_metadata(path) == {"prompt": "猫" * LONGEST_TEXT}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_texts_that_take_many_bytes_are_kept_shorter(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    save_image(picture(), path, {"prompt": "🟥" * LONGEST_TEXT, "negative_prompt": "🟦" * LONGEST_TEXT, "seed": 7})
    found = read_metadata(path)
    assert found["seed"] == 7
    assert found["prompt"] == "🟥" * (LONGEST_TEXT // 2)


def test_a_picture_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="20000x1 pixels cannot be WEBP"):
        save_image(Image.new("RGB", (20_000, 1)), tmp_path / "sheet.webp")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_others_has_no_metadata_of_ours(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a holiday"
    picture().save(tmp_path / "holiday.jpg", exif=exif)
    assert read_metadata(tmp_path / "holiday.jpg") == {}


@pytest.mark.parametrize("name", ["out.gif", "out", "out.tar.gz", ".png"])
def test_unknown_formats_name_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"end the name in one of \.png, \.jpg, \.jpeg, \.webp") as caught:
        save_image(picture(), tmp_path / name)
    assert isinstance(caught.value, RequestError)
    assert not list(tmp_path.iterdir())


def test_a_missing_or_wrong_place_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in ("missing/out.png", "folder.png", "file/out.png", "x" * 300 + ".png"):
        with pytest.raises(OutputError) as caught:
            save_image(picture(), tmp_path / place)
        assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder.png"]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    save_image(picture(), path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save_image(picture(8, 8), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_a_name_of_the_longest_length(tmp_path: Path) -> None:
    path = tmp_path / ("猫" * 83 + ".png")  # 253 bytes
    save_image(Image.new("RGB", (2, 2)), path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_pipes_and_devices_are_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    for place in (tmp_path / "pipe.png", tmp_path / "link.png"):
        for write in (check_writable, lambda place: save_image(picture(), place)):
            with pytest.raises(OutputError, match=r"pipe or a device.*name a file"):
                write(place)
    assert (tmp_path / "pipe.png").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "pipe.png"]


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "latest.png").symlink_to("there/1.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for _ in range(2):
        check_writable(tmp_path / "latest.png")
        save_image(picture(), tmp_path / "latest.png")
        assert (tmp_path / "latest.png").is_symlink()
        assert [path.name for path in (tmp_path / "there").iterdir()] == ["1.png"]
    for write in (check_writable, lambda place: save_image(picture(), place)):
        with pytest.raises(OutputError, match="in circles"):
            write(tmp_path / "loop.png")


def test_an_existing_picture_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    save_image(picture(48, 64), path)
    save_image(picture(8, 9), path)
    with Image.open(path) as loaded:
        assert loaded.size == (9, 8)


@pytest.mark.parametrize(("count", "grid"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (5, (3, 2)), (9, (3, 3))])
def test_a_sheet_is_about_square_and_shows_every_picture(count: int, grid: tuple[int, int]) -> None:
    colours = [(20 * i + 10, 0, 100) for i in range(count)]
    sheet = contact_sheet([Image.new("RGB", (40, 30), colour) for colour in colours])
    assert sheet.size == (grid[0] * 48 + 8, grid[1] * 38 + 8)
    shown = {tuple(colour) for colour in np.asarray(sheet).reshape(-1, 3).tolist()}
    assert shown == {*colours, (255, 255, 255)}


@pytest.mark.parametrize("caption", ["", "a red circle", "word " * 100, "x" * 40_000, "two\nlines 猫", "…"])
def test_captions_stay_below_their_picture(caption: str) -> None:
    black = Image.new("RGB", (80, 60))
    sheet = np.asarray(contact_sheet([black, black], [caption, ""]))
    np.testing.assert_array_equal(sheet[8:68, 8:88], 0)
    ink = (sheet[68:] < 200).any(axis=(0, 2))
    assert ink.any() == bool(caption)
    assert not ink[90:].any(), "a caption runs into its neighbour"


def test_pictures_of_different_sizes_share_a_sheet() -> None:
    sheet = contact_sheet([Image.new("RGB", (40, 10)), Image.new("L", (10, 40))], columns=1)
    assert sheet.size == (56, 104)


@pytest.mark.parametrize(("count", "captions"), [(0, None), (2, ["one"])])
def test_sheets_need_images_and_a_caption_each(count: int, captions: Any) -> None:
    with pytest.raises(ValueError, match="image"):
        contact_sheet([picture()] * count, captions)
