"""Pictures of pictures: labelled grids to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["grid"]

_MARGIN = 6
_WIDEST_LABEL = 40


def grid(
    rows: Mapping[str, Sequence[Image.Image]], labels: Sequence[str], cell: int = 128
) -> Image.Image:
    """Lay out rows of images under each other, one column a prompt.

    Args:
        rows: Title of a row to its images; all rows have as many as there are labels.
        labels: What each column shows.
        cell: Edge of an image in pixels; small pictures are enlarged without smoothing.

    Returns:
        An RGB image on white.
    """
    font = ImageFont.load_default(12)
    title = max(int(font.getlength(name)) for name in rows) + 2 * _MARGIN
    lines = [_wrapped(label, font, cell) for label in labels]
    head = 15 * max(len(line) for line in lines) + _MARGIN
    step = cell + _MARGIN
    sheet = Image.new("RGB", (title + step * len(labels), head + step * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, words in enumerate(lines):
        pen.multiline_text((title + column * step, 2), "\n".join(words), fill="black", font=font)
    for row, (name, images) in enumerate(rows.items()):
        top = head + row * step
        pen.text((_MARGIN, top + cell // 2 - 6), name, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, cell), (title + column * step, top))
    return sheet


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    method = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((cell, cell), method)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    """Break a label into at most three lines of `width` pixels."""
    lines = [""]
    for word in text[: 3 * _WIDEST_LABEL].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:3]
