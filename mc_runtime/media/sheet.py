"""Several pictures, or clips, on one sheet, with captions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from mc_runtime.media.clip import Clip

GAP = 8
TEXT_SIZE = 14
TEXT_LINES = 2
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """All `images` in rows, as square a sheet as their number allows; each caption under its picture, cut at two lines.

    Raises:
        ValueError: there is no image, or not one caption an image.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    width, height = (max(getattr(image, side) for image in images) for side in ("width", "height"))
    line = TEXT_SIZE + 4
    cell = height + (TEXT_LINES * line + GAP if captions else 0)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (cell + GAP) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    for index, image in enumerate(images):
        left, top = GAP + index % columns * (width + GAP), GAP + index // columns * (cell + GAP)
        sheet.paste(image.convert("RGB"), (left + (width - image.width) // 2, top + (height - image.height) // 2))
        for number, text in enumerate(_lines(captions[index], width, font) if captions else []):
            draw.text((left, top + height + GAP // 2 + number * line), text, fill=INK, font=font)
    return sheet


def clip_sheet(clips: Sequence[Clip], captions: Sequence[str] | None = None, columns: int | None = None) -> Clip:
    """A sheet that moves: all `clips` in rows as `contact_sheet` lays them out; one that ends first rests on its last frame.

    Raises:
        ValueError: there is no clip, their rates differ, or not one caption a clip.
    """
    if not clips:
        raise ValueError("a sheet needs at least one clip")
    if len({clip.fps for clip in clips}) > 1:
        raise ValueError("the clips of a sheet have one rate")
    moments = [
        [Image.fromarray(clip.frames[min(index, len(clip) - 1)]) for clip in clips] for index in range(max(map(len, clips)))
    ]
    return Clip.of_images([contact_sheet(images, captions, columns) for images in moments], clips[0].fps)


def _lines(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The caption broken at words into lines of `width` pixels; the last one ends in an ellipsis where it is cut."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > TEXT_LINES
    lines = [_fitting(text, width, font) for text in lines[:TEXT_LINES]]
    if cut and not lines[-1].endswith("..."):
        lines[-1] = _fitting(f"{lines[-1]} ...", width, font)
    return lines


def _fitting(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """`text`, cut to fit into `width`."""
    if font.getlength(text) <= width:
        return text
    kept = text[: max(1, width)]  # a glyph is wider than a pixel, so no more than this can fit
    while kept and font.getlength(f"{kept.rstrip()}...") > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}..."
